//! The FUSE file on a loop device, against the kernel of this machine.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, unused_imports, reason = "each test uses its part of what they share")]

#[path = "../src/fixture.rs"]
mod fixture;
mod support;

use std::path::Path;

use support::scenarios::{self, Served};
// The fixture's `crate::image`.
use ublkimg_driver::device::Transport;
use ublkimg_driver::image;

fn have_fuse() -> bool {
    for path in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(path).exists() {
            println!("SKIP: no {path} here");
            return false;
        }
    }
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIP: mounting FUSE and loop devices need root");
    }
    root
}

macro_rules! scenario {
    ($name:ident) => {
        #[test]
        fn $name() {
            if have_fuse() {
                scenarios::$name(Transport::Fuse.into());
            }
        }
    };
}

scenario!(the_whole_device_equals_its_source);
scenario!(pending_misses_do_not_delay_hits);
scenario!(a_chunk_that_fails_gives_eio_and_its_neighbours_read);
scenario!(stopping_fails_what_waits);
scenario!(many_readers_at_once);

#[test]
fn the_loop_device_caches_nothing_twice_and_goes_without_a_trace() {
    if !have_fuse() {
        return;
    }
    let mut served = Served::start(Transport::Fuse.into());
    let queue = Path::new("/sys/class/block").join(served.device().path().file_name().unwrap());
    let value = |name: &str| std::fs::read_to_string(queue.join(name)).unwrap().trim().to_owned();
    assert_eq!(value("ro"), "1");
    assert_eq!(value("loop/dio"), "1", "direct I/O");
    assert_eq!(value("loop/autoclear"), "1");
    assert_eq!(value("queue/logical_block_size"), "4096");
    assert_eq!(value("queue/read_ahead_kb"), "128");
    let run = served.run.clone();
    served.stop().unwrap();
    let backing = std::fs::read_to_string(queue.join("loop/backing_file")).unwrap_or_default();
    assert!(!backing.contains(run.to_str().unwrap()), "{backing}");
    assert!(std::fs::read_dir(&run).unwrap().next().is_none());
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(run.to_str().unwrap()));
}
