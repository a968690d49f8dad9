//! The ublk device against a real kernel: on the host where it has `/dev/ublk-control`, else in a guest
//! (`driver/tests/in-guest.sh ublk`).

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, unused_imports, reason = "each test uses its part of what they share")]

#[path = "../src/fixture.rs"]
mod fixture;
mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use support::scenarios::{self, Served};
// The fixture's `crate::image`.
use ublkimg_driver::device::{Transport, ublk};
use ublkimg_driver::image;

fn have_ublk() -> bool {
    let have = Path::new("/dev/ublk-control").exists();
    if !have {
        println!("SKIP: no /dev/ublk-control here; driver/tests/in-guest.sh runs this test in a guest");
    }
    have
}

macro_rules! scenario {
    ($name:ident) => {
        #[test]
        fn $name() {
            if have_ublk() {
                scenarios::$name(Transport::Ublk);
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
fn the_block_device_has_the_right_limits_and_goes_without_a_trace() {
    if !have_ublk() {
        return;
    }
    let mut served = Served::start(Transport::Ublk);
    let id = served.device().ublk_id().unwrap();
    let state = |id| ublk::devices().unwrap().into_iter().find(|device| device.id == id).map(|device| device.state);
    assert_eq!(state(id), Some(ublk::DeviceState::Live));
    let path = served.device().path().to_owned();
    let queue = Path::new("/sys/class/block").join(path.file_name().unwrap());
    let value = |name: &str| std::fs::read_to_string(queue.join(name)).unwrap().trim().to_owned();
    assert_eq!(value("ro"), "1");
    assert_eq!(value("queue/logical_block_size"), "4096");
    assert_eq!(value("queue/physical_block_size"), "4096");
    assert_eq!(value("queue/read_ahead_kb"), "128");
    assert_eq!(value("queue/max_sectors_kb"), "512");
    let written = std::fs::File::options().write(true).open(&path).and_then(|file| file.write_at(&[1; 4096], 0));
    assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    served.stop().unwrap();
    assert!(!path.exists());
    assert_eq!(state(id), None);
}
