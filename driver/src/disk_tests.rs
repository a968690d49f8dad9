//! The disk of the store, full, broken and made room on, under images that are read.

use std::collections::BTreeSet;
use std::fs;
use std::time::SystemTime;

use rustix::io::Errno;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_tests::host::wait_until;

use crate::fixture::{Image, LayerContent, read};
use crate::store::journal;
use crate::tests::{Rig, device_blocks};

/// Chunks of 64 blocks, each of other bytes than the others, which compress well.
fn large(chunks: u64) -> Image {
    let chunk = |number: u64| number.to_le_bytes().repeat(64 * BLOCK_SIZE / 8);
    let chunks: Vec<Vec<u8>> = (1..=chunks).map(chunk).collect();
    let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
    Image::new(&[LayerContent::of_chunks(&chunks)])
}

#[test]
fn a_disk_that_is_broken_from_the_start_costs_no_error() {
    let rig = Rig::new();
    let image = large(20);
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    journal::set_trouble(rig.root.path(), Some(|_| Some(Errno::IO)));
    for _ in 0..2 {
        assert!(read(&loaded.image, 0, device_blocks(&image)).unwrap() == image.device);
    }
    journal::forget(rig.root.path());
    let statistics = loaded.image.statistics();
    assert_eq!((statistics.fetched_chunks, statistics.errors), (20, 0));
    assert_eq!((loaded.image.stored_bytes().0, rig.store.overflowed_chunks()), (0, 20));
}

#[test]
fn a_data_file_that_is_cut_is_fetched_again() {
    let rig = Rig::new();
    let image = large(20);
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    assert!(read(&loaded.image, 0, device_blocks(&image)).unwrap() == image.device);
    for entry in fs::read_dir(rig.root.path().join("blobs")).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_some_and(|extension| extension == "data") {
            fs::File::options().write(true).open(entry.path()).unwrap().set_len(10 * 64 * BLOCK_SIZE as u64).unwrap();
        }
    }
    let metadata_blocks = image.layer_starts[0];
    for start in (0..20 * 64).step_by(64).map(|block| metadata_blocks + block) {
        let at = start as usize * BLOCK_SIZE;
        assert!(read(&loaded.image, start, 64).unwrap() == image.device[at..at + 64 * BLOCK_SIZE]);
    }
    assert_eq!((rig.store.overflowed_chunks(), loaded.image.statistics().errors), (10, 0));
}

/// 300 chunks for 256 places: what one reader waits for may be given away for another before it is read.
#[test]
fn more_readers_than_memory_has_room_for_get_no_error() {
    let rig = Rig::new();
    let image = large(300);
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    journal::set_trouble(rig.root.path(), Some(|_| Some(Errno::NOSPC)));
    let all = device_blocks(&image);
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (image, served) = (&image, &loaded.image);
            scope.spawn(move || {
                // As long as the longest request of a device, over three chunks.
                let starts = (0..all).step_by(128).map(|start| (start + 13 + reader * all / 8) % (all - 128));
                for start in starts {
                    let at = start as usize * BLOCK_SIZE;
                    assert!(read(served, start, 128).unwrap() == image.device[at..at + 128 * BLOCK_SIZE]);
                }
            });
        }
    });
    journal::forget(rig.root.path());
    assert_eq!(loaded.image.statistics().errors, 0);
    assert!(rig.store.overflowed_chunks() > 300, "some were given away and fetched again");
}

#[test]
fn what_was_not_read_again_goes_first() {
    for again in [0, 1] {
        let rig = Rig::new();
        let images = [11, 12].map(|seed| Image::new(&[LayerContent::new(seed, &[64; 8])]));
        let loaded = [0, 1].map(|at: usize| rig.attach(&rig.push(&images[at], &format!("v{at}"))).unwrap());
        let whole = |at: usize| {
            assert!(read(&loaded[at].image, 0, device_blocks(&images[at])).unwrap() == images[at].device);
        };
        whole(0);
        whole(1);
        let now_s = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let before_s = now_s();
        wait_until("the next second", || now_s() > before_s);
        rig.store.tick();
        whole(again);
        let layer_bytes = loaded[0].image.stored_bytes().1;
        assert_eq!(rig.store.make_room(layer_bytes, &BTreeSet::new(), &BTreeSet::new()).unwrap(), layer_bytes);
        let stored = [0, 1].map(|at: usize| loaded[at].image.stored_bytes().0);
        assert_eq!((stored[again], stored[1 - again]), (layer_bytes, 0));
        whole(0);
        whole(1);
        let fetched = [0, 1].map(|at: usize| loaded[at].image.statistics().fetched_chunks);
        assert_eq!((fetched[again], fetched[1 - again]), (8, 16));
    }
}
