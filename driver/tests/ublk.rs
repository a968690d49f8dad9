//! The ublk device against a real kernel: on the host where it has `/dev/ublk-control`, else in a guest.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;
use std::sync::Arc;

use support::{block_content, open_direct, read_blocks, write_content};
use ublkimg_driver::device::{PreparedUblk, ublk};
use ublkimg_driver::image::ServedImage;

fn have_ublk() -> bool {
    let have = Path::new("/dev/ublk-control").exists();
    if !have {
        println!("SKIP: no /dev/ublk-control here; run this test in a guest");
    }
    have
}

#[test]
fn the_whole_device_equals_its_source() {
    if !have_ublk() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("content");
    write_content(&path, 1024);
    let image = Arc::new(ServedImage::complete(std::fs::File::open(&path).unwrap(), 1024).unwrap());
    let prepared = PreparedUblk::add(image).unwrap();
    let id = prepared.id();
    let device = prepared.start().unwrap();
    assert_eq!(ublk::devices().unwrap().iter().find(|device| device.id == id).unwrap().state, ublk::DeviceState::Live);
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
    assert_eq!(value("queue/logical_block_size"), "4096");
    assert_eq!(value("queue/read_ahead_kb"), "128");
    assert_eq!(value("queue/max_sectors_kb"), "512");
    let path = device.path().to_owned();
    device.stop().unwrap();
    assert!(!path.exists());
    assert!(ublk::devices().unwrap().iter().all(|device| device.id != id));
}
