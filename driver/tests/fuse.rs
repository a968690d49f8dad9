//! The FUSE file on a loop device, against the kernel of this machine.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;
use std::sync::Arc;

use support::{block_content, open_direct, read_blocks, write_content};
use ublkimg_driver::device::PreparedFuse;
use ublkimg_driver::image::ServedImage;

fn have_fuse() -> bool {
    for path in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(path).exists() {
            println!("SKIP: no {path} here");
            return false;
        }
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: not root");
        return false;
    }
    true
}

#[test]
fn the_whole_device_equals_its_source() {
    if !have_fuse() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("content");
    write_content(&path, 1024);
    let image = Arc::new(ServedImage::complete(std::fs::File::open(&path).unwrap(), 1024).unwrap());
    let run = directory.path().join("run");
    let device = PreparedFuse::new(image, &run).unwrap().start().unwrap();
    let file = open_direct(device.path());
    for start in (0..1280).step_by(256) {
        let bytes = read_blocks(&file, start, 256).unwrap();
        for (block, bytes) in (start..).zip(bytes.chunks(4096)) {
            let expected = if block < 1024 { block_content(block) } else { vec![0; 4096] };
            assert!(bytes == expected, "block {block}");
        }
    }
    drop(file);
    let queue = Path::new("/sys/class/block").join(device.path().file_name().unwrap());
    let value = |name: &str| std::fs::read_to_string(queue.join(name)).unwrap().trim().to_owned();
    assert_eq!(value("ro"), "1");
    assert_eq!(value("loop/dio"), "1");
    assert_eq!(value("queue/logical_block_size"), "4096");
    println!(
        "read_ahead_kb {} max_sectors_kb {} nr_requests {}",
        value("queue/read_ahead_kb"),
        value("queue/max_sectors_kb"),
        value("queue/nr_requests")
    );
    device.stop().unwrap();
    assert!(!queue.join("loop/backing_file").exists());
    assert!(std::fs::read_dir(&run).unwrap().next().is_none());
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(run.to_str().unwrap()));
}
