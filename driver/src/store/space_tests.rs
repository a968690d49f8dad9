//! Eviction and damage: what goes, what stays, and that nobody reads a hole.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::io::Errno;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_tests::fault_row::FaultRow;

use super::*;

const BLOCKS: u32 = 1024;

fn index(number: u8) -> Sha256 {
    Sha256([number; 32])
}

fn content(block: u32) -> Vec<u8> {
    (0..BLOCK_SIZE).map(|at| at.to_le_bytes()[0] ^ block.to_le_bytes()[0] | 1).collect()
}

fn write(blob: &BlobFile, blocks: std::ops::Range<u32>) {
    let data: Vec<u8> = blocks.clone().flat_map(content).collect();
    blob.write(blocks.start, &data).unwrap();
}

fn store_at(root: &Path) -> Store {
    Store::open_in_boot(root, BootId([1; 16])).unwrap()
}

fn none() -> std::collections::BTreeSet<Sha256> {
    std::collections::BTreeSet::new()
}

#[test]
fn what_was_not_read_for_the_longest_time_goes_first_whatever_it_belongs_to() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let [one, two] = [1, 2].map(|number| store.blob(index(number), BLOCKS).unwrap());
    for blob in [&one, &two] {
        (0..BLOCKS).step_by(64).for_each(|start| write(blob, start..start + 64));
    }
    let clock = &store.shared.clock_s;
    for (second, blob, blocks) in [(10, &one, 0..1024), (20, &two, 0..1024), (30, &one, 256..512), (5, &two, 512..768)]
    {
        clock.store(second, Ordering::Relaxed);
        blob.note_use(blocks);
    }
    let freed = store.make_room(3 << 20, &none(), &none()).unwrap();
    assert_eq!(freed, 3 << 20);
    assert_eq!(two.first_missing(0..BLOCKS), Some(512), "used at 5");
    assert_eq!((two.count(512..768), two.present_blocks()), (0, 768));
    assert_eq!((one.count(0..256), one.count(256..512), one.present_blocks()), (0, 256, 512));
    assert!(store.room().unwrap().used_bytes < 6 << 20, "{:?}", store.room().unwrap());
    assert_eq!(store.check().unwrap().damaged_blocks, 0);
}

#[test]
fn what_is_pinned_stays_and_what_is_empty_and_idle_leaves_no_file() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    for number in [1, 2, 3] {
        write(&store.blob(index(number), BLOCKS).unwrap(), 0..64);
    }
    let in_use = store.blob(index(3), BLOCKS).unwrap();
    let (pinned, objects) = ([index(1)].into(), none());
    assert_eq!(store.make_room(u64::MAX, &pinned, &objects).unwrap(), 2 * 64 * 4096);
    let left: Vec<String> = store.usage().unwrap().into_iter().map(|usage| usage.index).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(store.blob(index(1), BLOCKS).unwrap().present_blocks(), 64);
    assert_eq!(in_use.present_blocks(), 0);
    let files = fs::read_dir(store.layout.blobs()).unwrap().count();
    assert_eq!(files, 4 + 3, "the pinned one was not synced yet");
}

#[test]
fn looking_at_a_blob_is_no_use_of_it_and_its_last_use_outlives_the_process() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let blob = store.blob(index(1), BLOCKS).unwrap();
    write(&blob, 0..512);
    store.shared.clock_s.store(1000, Ordering::Relaxed);
    blob.note_use(0..BLOCKS);
    drop((blob, store));
    for _ in 0..2 {
        assert_eq!(store_at(root.path()).usage().unwrap()[0].used_s, 1000);
    }
}

#[test]
fn objects_go_when_nobody_needs_them_and_they_are_old() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let [young, old, needed] = [1_u8, 2, 3].map(|number| {
        let object = vec![number; 5000];
        store.put_object(Sha256::of(&object), &object).unwrap();
        Sha256::of(&object)
    });
    for digest in [old, needed] {
        let file = File::options().write(true).open(store.layout.object(digest)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(7200)).unwrap();
    }
    store.make_room(u64::MAX, &none(), &[needed].into()).unwrap();
    let there = [young, old, needed].map(|digest| store.object(digest).unwrap().is_some());
    assert_eq!(there, [true, false, true]);

    let held = [store.hold(needed), store.hold(needed)];
    for hold in held {
        store.make_room(u64::MAX, &none(), &none()).unwrap();
        assert!(store.object(needed).unwrap().is_some(), "nobody knows of it yet but who holds it");
        drop(hold);
    }
    store.make_room(u64::MAX, &none(), &none()).unwrap();
    assert!(store.object(needed).unwrap().is_none());
}

#[test]
fn limits_say_how_much_must_go() {
    let room = Room { used_bytes: 5 << 30, free_bytes: 3 << 30, disk_bytes: 100 << 30, overflowed_chunks: 0 };
    let excess = |cache_bytes_max, free_bytes_min| room.excess_bytes(&Limits { cache_bytes_max, free_bytes_min });
    assert_eq!(excess(None, None), 0, "1 GiB is to stay free");
    assert_eq!(excess(Some(4 << 30), None), 1 << 30);
    assert_eq!(excess(Some(4 << 30), Some(5 << 30)), 2 << 30);
    assert_eq!(excess(None, Some(90 << 30)), 5 << 30, "no more than there is");
    let small = Room { free_bytes: 1, disk_bytes: 200, ..room };
    assert_eq!(small.excess_bytes(&Limits::default()), 9, "a twentieth");
}

#[test]
fn a_changed_byte_on_the_disk_is_found_and_dropped() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let blob = store.blob(index(1), BLOCKS).unwrap();
    write(&blob, 10..74);
    store.put_object(Sha256::of(b"object"), b"object").unwrap();
    assert_eq!(store.check().unwrap(), Checked { blocks: 64, objects: 1, ..Checked::default() });
    blob.file().write_all_at(b"!", 20 * BLOCK_SIZE as u64 + 5).unwrap();
    fs::write(store.layout.object(Sha256::of(b"object")), b"objecT").unwrap();
    let found = Checked { blocks: 63, damaged_blocks: 1, damaged_objects: 1, ..Checked::default() };
    assert_eq!(store.check().unwrap(), found);
    assert_eq!(blob.first_missing(10..74), Some(20));
    write(&blob, 20..21);
    assert_eq!(store.check().unwrap(), Checked { blocks: 64, ..Checked::default() });
}

/// Readers that look at the count of evictions before and after they read never take a hole for data, although the
/// blocks come and go all the time.
#[test]
fn eviction_during_reads_never_serves_a_hole() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let blob = store.blob(index(1), 64).unwrap();
    let expected: Vec<u8> = (0..64).flat_map(content).collect();
    let is_over = AtomicBool::new(false);
    // What was read in peace, and what had to be read again.
    let [reads, stale] = [AtomicU32::new(0), AtomicU32::new(0)];
    let fault = FaultRow::begins("evicted while it is read");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = vec![0; expected.len()];
            while !is_over.load(Ordering::Relaxed) {
                let before = blob.evictions().count();
                if blob.first_missing(0..64).is_some() {
                    continue;
                }
                blob.file().read_exact_at(&mut bytes, 0).unwrap();
                if blob.evictions().count() != before {
                    stale.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                assert!(bytes == expected, "a hole was served");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let has_seen_both = || reads.load(Ordering::Relaxed) > 0 && stale.load(Ordering::Relaxed) > 0;
        let mut evictions = 0;
        while (evictions < 300 || !has_seen_both()) && !reader.is_finished() && Instant::now() < deadline {
            blob.write(0, &expected).unwrap();
            std::thread::yield_now();
            blob.evict(std::slice::from_ref(&(0..64))).unwrap();
            evictions += 1;
        }
        is_over.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        assert!(has_seen_both(), "{reads:?} reads, {stale:?} tried again in {evictions} evictions");
    });
    fault.ends("looked up again, never a hole (300 evictions, all of them)");
}

#[test]
fn a_disk_that_fails_costs_no_error() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let blob = store.blob(index(1), BLOCKS).unwrap();
    write(&blob, 0..64);
    for (errno, start) in [(Errno::NOSPC, 64), (Errno::IO, 128)] {
        let full: journal::Trouble = |_| Some(Errno::NOSPC);
        let broken: journal::Trouble = |_| Some(Errno::IO);
        journal::set_trouble(root.path(), Some(if errno == Errno::IO { broken } else { full }));
        let fault = FaultRow::begins("a chunk that the cache disk does not take: full, or an error");
        write(&blob, start..start + 64);
        fault.ends("the chunk is kept in memory");
        journal::set_trouble(root.path(), None);
        assert_eq!(blob.count(start..start + 64), 0, "not on the disk");
        assert!(blob.holds(start..start + 64), "in memory");
    }
    assert_eq!(store.room().unwrap().overflowed_chunks, 2);
    write(&blob, 192..256);
    assert_eq!(blob.count(192..256), 64, "the disk is well again");
    blob.cannot_read(0..64);
    assert!(!blob.holds(0..64), "to be fetched again");
    write(&blob, 0..64);
    assert!(blob.count(0..64) == 0 && blob.holds(0..64), "and kept in memory from then on");
}

#[test]
fn memory_takes_so_many_chunks_and_gives_the_oldest_away() {
    let root = tempfile::tempdir().unwrap();
    let store = store_at(root.path());
    let blob = store.blob(index(1), 1 << 16).unwrap();
    let full: journal::Trouble = |path| path.extension().is_some_and(|it| it == "data").then_some(Errno::NOSPC);
    journal::set_trouble(root.path(), Some(full));
    let before = blob.evictions().count();
    for start in (0..300).map(|chunk| chunk * 64) {
        write(&blob, start..start + 64);
    }
    journal::set_trouble(root.path(), None);
    assert!(!blob.holds(0..1) && !blob.holds(43 * 64..43 * 64 + 1), "the first 44 are gone");
    assert!(blob.holds(44 * 64..300 * 64));
    assert_eq!(blob.evictions().count() - before, 44, "their readers are told");
}

#[test]
fn pins_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let holding = Holding {
        reference: "registry/app:1".to_owned(),
        manifest: index(7),
        objects: [index(7), index(8)].into(),
        blobs: [index(1)].into(),
    };
    store_at(root.path()).pin(&holding).unwrap();
    let store = store_at(root.path());
    fs::write(store.layout.pins().join("other"), b"{").unwrap();
    assert_eq!(store.pins().unwrap(), [holding]);
    store.unpin(index(7)).unwrap();
    store.unpin(index(7)).unwrap();
    assert_eq!(store.pins().unwrap(), []);
}
