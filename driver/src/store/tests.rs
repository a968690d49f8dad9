//! Crashes, simulated at every step: a process that dies keeps the page cache, a machine that dies keeps what was synced.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::wait_until;

use super::*;

const BOOT: BootId = BootId([1; 16]);
const NEXT_BOOT: BootId = BootId([2; 16]);
const BLOCKS: u32 = 200;

fn index() -> Sha256 {
    Sha256::of(b"index")
}

/// The content that block `block` has after its `round`th writing.
fn content(block: u32, round: u8) -> Vec<u8> {
    (0..BLOCK_SIZE).map(|at| at.to_le_bytes()[0] ^ block.to_le_bytes()[0] ^ round ^ 0x5A).collect()
}

fn contents(start: u32, len: u32) -> Vec<u8> {
    (start..start + len).flat_map(|block| content(block, 0)).collect()
}

fn read_block(blob: &BlobFile, block: u32) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_SIZE];
    blob.file().read_exact_at(&mut bytes, u64::from(block) * BLOCK_SIZE as u64).unwrap();
    bytes
}

fn present(blob: &BlobFile) -> Vec<u32> {
    (0..blob.blocks()).filter(|block| blob.first_missing(*block..block + 1).is_none()).collect()
}

fn reopened(root: &Path, boot: BootId) -> (Store, Arc<BlobFile>) {
    let store = Store::open_in_boot(root, boot).unwrap();
    let blob = store.blob(index(), BLOCKS).unwrap();
    (store, blob)
}

/// A store that was used by a process that is now gone without a last sync.
fn killed(root: &Path, work: impl FnOnce(&BlobFile)) {
    let (mut store, blob) = reopened(root, BOOT);
    work(&blob);
    // The thread's last sync is what `kill -9` leaves out.
    store.blobs.lock().clear();
    store.stop_sync = None;
    store.sync_thread.take().unwrap().join().unwrap();
}

#[test]
fn a_killed_process_forgets_nothing() {
    let root = tempfile::tempdir().unwrap();
    killed(root.path(), |blob| blob.write(60, &contents(60, 10)).unwrap());
    let (_store, blob) = reopened(root.path(), BOOT);
    assert_eq!(present(&blob), (60..70).collect::<Vec<_>>());
    assert_eq!(read_block(&blob, 69), content(69, 0));
}

#[test]
fn data_without_its_bit_is_not_there() {
    let root = tempfile::tempdir().unwrap();
    killed(root.path(), |blob| blob.write_data(3, &contents(3, 2)).unwrap());
    let (_store, blob) = reopened(root.path(), BOOT);
    assert_eq!(blob.present_blocks(), 0);
}

#[test]
fn another_boot_believes_only_what_was_synced() {
    let root = tempfile::tempdir().unwrap();
    killed(root.path(), |blob| {
        blob.write(1, &contents(1, 3)).unwrap();
        blob.sync().unwrap();
        blob.write(10, &contents(10, 3)).unwrap();
    });
    let (store, blob) = reopened(root.path(), NEXT_BOOT);
    assert_eq!(present(&blob), [1, 2, 3]);
    drop((store, blob));
    let (_store, blob) = reopened(root.path(), BOOT);
    assert_eq!(present(&blob), [1, 2, 3], "the first boot's bitmap was replaced");
}

#[test]
fn closing_the_store_makes_everything_durable() {
    let root = tempfile::tempdir().unwrap();
    {
        let (_store, blob) = reopened(root.path(), BOOT);
        blob.write(5, &contents(5, 1)).unwrap();
    }
    assert_eq!(present(&reopened(root.path(), NEXT_BOOT).1), [5]);
}

#[test]
fn what_survived_a_kill_is_synced_by_the_next_process() {
    let root = tempfile::tempdir().unwrap();
    killed(root.path(), |blob| blob.write(5, &contents(5, 1)).unwrap());
    drop(reopened(root.path(), BOOT));
    assert_eq!(present(&reopened(root.path(), NEXT_BOOT).1), [5]);
}

#[test]
fn a_damaged_bitmap_is_an_absent_one() {
    let root = tempfile::tempdir().unwrap();
    let live = Layout::new(root.path()).blob(index()).live;
    let durable = Layout::new(root.path()).blob(index()).durable;
    let good = || {
        killed(root.path(), |blob| {
            blob.write(0, &contents(0, 7)).unwrap();
            blob.sync().unwrap();
        });
    };
    let damages: [fn(&mut Vec<u8>); 6] = [
        |bytes| bytes.push(0),
        |bytes| bytes.truncate(97),
        |bytes| bytes.clear(),
        |bytes| bytes[0] ^= 1,
        |bytes| bytes[40] ^= 1,
        // A bit past the last block; in the durable one the digest of the words notices as well.
        |bytes| *bytes.last_mut().unwrap() |= 0x80,
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        for path in [&live, &durable] {
            good();
            let mut bytes = fs::read(path).unwrap();
            damage(&mut bytes);
            fs::write(path, bytes).unwrap();
            let boot = if path == &live { BOOT } else { NEXT_BOOT };
            let fault = FaultRow::begins("a damaged bitmap");
            let (_store, blob) = reopened(root.path(), boot);
            fault.ends("taken for absent: its blocks are fetched again");
            let expected = if path == &live { 7 } else { 0 };
            assert_eq!(blob.present_blocks(), expected, "damage {number} to {}", path.display());
        }
    }
}

#[test]
fn a_data_file_of_another_length_is_empty() {
    let root = tempfile::tempdir().unwrap();
    let data = Layout::new(root.path()).blob(index()).data;
    killed(root.path(), |blob| {
        blob.write(0, &contents(0, 7)).unwrap();
        blob.sync().unwrap();
    });
    fs::remove_file(&data).unwrap();
    assert_eq!(reopened(root.path(), BOOT).1.present_blocks(), 0);
    killed(root.path(), |blob| {
        blob.write(0, &contents(0, 7)).unwrap();
        blob.sync().unwrap();
    });
    OpenOptions::new().write(true).open(&data).unwrap().set_len(4096).unwrap();
    let fault = FaultRow::begins("a data file that was cut");
    let (_store, blob) = reopened(root.path(), BOOT);
    fault.ends("empty: its blocks are fetched again");
    assert_eq!(blob.present_blocks(), 0);
    assert_eq!(read_block(&blob, 0), vec![0; BLOCK_SIZE]);
}

#[test]
fn one_process_owns_the_store_for_as_long_as_a_blob_is_open() {
    let root = tempfile::tempdir().unwrap();
    let (store, blob) = reopened(root.path(), BOOT);
    let busy = || Store::open_in_boot(root.path(), BOOT).map(drop).map_err(|error| error.kind());
    let fault = FaultRow::begins("two processes want one store");
    assert_eq!(busy(), Err(ErrorKind::Busy));
    fault.ends("the second is refused");
    drop(store);
    assert_eq!(busy(), Err(ErrorKind::Busy));
    drop(blob);
    assert_eq!(busy(), Ok(()));
}

#[test]
fn one_index_is_one_file_and_one_length() {
    let root = tempfile::tempdir().unwrap();
    let (store, blob) = reopened(root.path(), BOOT);
    assert!(Arc::ptr_eq(&blob, &store.blob(index(), BLOCKS).unwrap()));
    assert_eq!(store.blob(index(), BLOCKS + 1).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn writes_outside_of_the_file_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let (_store, blob) = reopened(root.path(), BOOT);
    for (block, len) in [(BLOCKS, BLOCK_SIZE), (BLOCKS - 1, 2 * BLOCK_SIZE), (u32::MAX, BLOCK_SIZE), (0, 100)] {
        assert_eq!(blob.write(block, &vec![0; len]).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert_eq!(blob.present_blocks(), 0);
}

#[test]
fn writers_that_share_a_word_lose_no_bit() {
    let root = tempfile::tempdir().unwrap();
    killed(root.path(), |blob| {
        std::thread::scope(|scope| {
            for writer in 0..4 {
                scope.spawn(move || {
                    for block in (writer..BLOCKS).step_by(4) {
                        blob.write(block, &content(block, 0)).unwrap();
                    }
                });
            }
        });
    });
    let (_store, blob) = reopened(root.path(), BOOT);
    assert_eq!(blob.present_blocks(), BLOCKS);
    for block in 0..BLOCKS {
        assert_eq!(read_block(&blob, block), content(block, 0));
    }
}

#[test]
fn objects_are_checked_and_left_overs_removed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open_in_boot(root.path(), BOOT).unwrap();
    let digest = Sha256::of(b"manifest");
    assert_eq!(store.object(digest).unwrap(), None);
    store.put_object(digest, b"manifest").unwrap();
    assert_eq!(store.object(digest).unwrap().unwrap(), b"manifest");
    fs::write(store.layout.object(digest), b"manifesT").unwrap();
    assert_eq!(store.object(digest).unwrap(), None);
    let left_over = ["objects/x.tmp", "links.json.0.tmp"].map(|name| root.path().join(name));
    for path in &left_over {
        fs::write(path, b"").unwrap();
    }
    drop(store);
    drop(Store::open_in_boot(root.path(), BOOT).unwrap());
    assert_eq!(left_over.map(|path| path.exists()), [false, false]);
}

/// A file system of 64 blocks, unmounted when dropped.
struct TinyFileSystem(tempfile::TempDir);

impl TinyFileSystem {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("tiny", dir.path(), "tmpfs", flags, c"size=256k") {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                println!("SKIP: cannot mount a tmpfs: {error}");
                None
            }
        }
    }
}

impl Drop for TinyFileSystem {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn what_a_full_disk_does_not_take_is_in_memory() {
    let Some(disk) = TinyFileSystem::mount() else { return };
    let (store, blob) = reopened(disk.0.path(), BOOT);
    blob.write(0, &contents(0, 10)).unwrap();
    blob.write(10, &contents(10, 60)).unwrap();
    assert_eq!(blob.present_blocks(), 10, "on the disk");
    assert!(blob.holds(0..70) && !blob.holds(0..71));
    assert_eq!(store.room().unwrap().overflowed_chunks, 1);
    let (place, end) = blob.find(69..80);
    let Some(Place::Memory(block)) = place else { panic!("{place:?}") };
    let mut bytes = vec![0; BLOCK_SIZE];
    blob.memory().read_exact_at(&mut bytes, u64::from(block) * BLOCK_SIZE as u64).unwrap();
    assert_eq!((bytes, end), (content(69, 0), 70));
    assert_eq!(read_block(&blob, 9), content(9, 0));
    // More than a chunk is not for memory.
    assert_eq!(blob.write(100, &contents(100, 100)).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn room_is_made_on_a_disk_without_a_free_byte() {
    let Some(disk) = TinyFileSystem::mount() else { return };
    let root = disk.0.path();
    let (store, blob) = reopened(root, BOOT);
    blob.write(0, &contents(0, 20)).unwrap();
    store.sync().unwrap();
    let mut filler = File::create(root.join("filler")).unwrap();
    let full = std::iter::repeat_with(|| filler.write_all(&[1; BLOCK_SIZE])).find_map(std::result::Result::err);
    assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(store.room().unwrap().free_bytes, 0);

    blob.evict(&[0..5, 7..10]).unwrap();
    let left: Vec<u32> = (5..7).chain(10..20).collect();
    assert_eq!(present(&blob), left);
    assert!(store.room().unwrap().free_bytes >= 8 * BLOCK_SIZE as u64, "{:?}", store.room().unwrap());
    store.sync().unwrap();
    drop((store, blob));
    let (store, blob) = reopened(root, NEXT_BOOT);
    assert_eq!(present(&blob), left, "there is room for what says so");

    let full = std::iter::repeat_with(|| filler.write_all(&[1; BLOCK_SIZE])).find_map(std::result::Result::err);
    assert!(full.is_some() && store.room().unwrap().free_bytes == 0);
    let none = std::collections::BTreeSet::new();
    assert_eq!(store.make_room(1, &none, &none).unwrap(), 12 * BLOCK_SIZE as u64);
    assert!(store.room().unwrap().free_bytes >= 12 * BLOCK_SIZE as u64);
    assert_eq!(store.check().unwrap(), Checked::default());
}

#[test]
fn an_eviction_that_cannot_be_noted_leaves_everything_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let (_store, blob) = reopened(root.path(), BOOT);
    blob.write(0, &contents(0, 10)).unwrap();
    let full: journal::Trouble =
        |path| path.extension().is_some_and(|extension| extension == "live").then_some(rustix::io::Errno::NOSPC);
    journal::set_trouble(root.path(), Some(full));
    assert_eq!(blob.evict(std::slice::from_ref(&(2..4))).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(blob.present_blocks(), 10, "to be evicted another time");
    journal::forget(root.path());
    blob.evict(std::slice::from_ref(&(2..4))).unwrap();
    assert_eq!(present(&blob), [0, 1, 4, 5, 6, 7, 8, 9]);
    assert_eq!(read_block(&blob, 3), vec![0; BLOCK_SIZE]);
}

/// Nobody writes on: the blocks are dirty already, and wake nobody.
#[test]
fn a_sync_that_failed_is_tried_again() {
    static FAILED: AtomicU32 = AtomicU32::new(0);
    let root = tempfile::tempdir().unwrap();
    let full: journal::Trouble = |path| {
        let is_durable = path.extension().is_some_and(|extension| extension == "tmp");
        is_durable.then(|| {
            FAILED.fetch_add(1, Ordering::Relaxed);
            rustix::io::Errno::NOSPC
        })
    };
    let (_store, blob) = reopened(root.path(), BOOT);
    journal::set_trouble(root.path(), Some(full));
    blob.write(0, &contents(0, 10)).unwrap();
    // Once since the file was opened, once since it was written, and again.
    wait_until("it is tried again", || FAILED.load(Ordering::Relaxed) >= 3);
    assert!(blob.is_dirty());
    journal::forget(root.path());
    let durable = Layout::new(root.path()).blob(index()).durable;
    wait_until("it is on the disk", || durable.exists());
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        start: u32,
        len: u32,
    },
    /// A write that was cut off before its bits.
    CutWrite {
        start: u32,
        len: u32,
    },
    Sync,
    Kill,
    PowerCut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..BLOCKS, 1..70_u32).prop_map(|(start, len)| (start, len.min(BLOCKS - start)));
    let step = prop_oneof![
        6 => range().prop_map(|(start, len)| Step::Write { start, len }),
        2 => range().prop_map(|(start, len)| Step::CutWrite { start, len }),
        2 => Just(Step::Sync),
        2 => Just(Step::Kill),
        1 => Just(Step::PowerCut),
    ];
    prop::collection::vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn in_every_history_it_knows_what_it_must_and_never_lies(steps in steps()) {
        let root = tempfile::tempdir().unwrap();
        let mut boot = BOOT;
        // What must be there, and whether it is durable.
        let mut model = BTreeMap::new();
        let (mut store, mut blob) = reopened(root.path(), boot);
        for step in steps {
            match step {
                Step::Write { start, len } => {
                    blob.write(start, &contents(start, len)).unwrap();
                    for block in start..start + len {
                        model.entry(block).or_insert(false);
                    }
                }
                Step::CutWrite { start, len } => blob.write_data(start, &contents(start, len)).unwrap(),
                Step::Sync => {
                    store.sync().unwrap();
                    model.values_mut().for_each(|durable| *durable = true);
                }
                Step::Kill | Step::PowerCut => {
                    store.blobs.lock().clear();
                    drop((store, blob));
                    if matches!(step, Step::PowerCut) {
                        boot = BootId([boot.0[0] + 1; 16]);
                        model.retain(|_, durable| *durable);
                    }
                    (store, blob) = reopened(root.path(), boot);
                }
            }
            for block in 0..BLOCKS {
                let there = blob.first_missing(block..block + 1).is_none();
                prop_assert!(there || !model.contains_key(&block), "block {} is forgotten", block);
                prop_assert!(!there || read_block(&blob, block) == content(block, 0), "block {} is a lie", block);
            }
        }
    }
}

#[test]
fn many_may_keep_one_object_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open_in_boot(root.path(), BOOT).unwrap();
    let object = vec![7; 100_000];
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| store.put_object(Sha256::of(&object), &object).unwrap());
        }
    });
    assert_eq!(store.object(Sha256::of(&object)).unwrap().unwrap(), object);
}
