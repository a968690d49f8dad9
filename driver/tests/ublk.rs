//! The ublk device against a real kernel: on the host where it has `/dev/ublk-control`, else in a guest
//! (`driver/tests/in-guest.sh ublk`).

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, unused_imports, reason = "each test uses its part of what they share")]

#[path = "../src/fixture.rs"]
mod fixture;
mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use support::scenarios::{self, How, Served};
// The fixture's `crate::image`.
use ublkimg_driver::device::{DataPath, QueueOptions, Transport, ublk};
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
                for data_path in [None, Some(DataPath::Copy)] {
                    let queue = QueueOptions { data_path, ..QueueOptions::default() };
                    scenarios::$name(How { transport: Transport::Ublk, queue });
                }
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
    let mut served = Served::start(Transport::Ublk.into());
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

/// Bits 0 and 11 of the driver's features: what zero copy takes.
const ZERO_COPY: u64 = 1 | 1 << 11;

#[test]
fn data_goes_the_best_way_that_the_kernel_has_or_the_one_asked_for() {
    if !have_ublk() {
        return;
    }
    let has_zero_copy = ublk::features().unwrap() & ZERO_COPY == ZERO_COPY;
    let best = if has_zero_copy { DataPath::ZeroCopy } else { DataPath::Copy };
    for (asked, expected) in [(None, best), (Some(DataPath::Copy), DataPath::Copy), (Some(best), best)] {
        let queue = QueueOptions { data_path: asked, depth: Some(3) };
        let mut served = Served::start(How { transport: Transport::Ublk, queue });
        assert_eq!(served.device().data_path(), Some(expected), "asked for {asked:?}");
        scenarios::compare_device(served.device().path(), &served.origin.content());
        served.stop().unwrap();
    }
}
