//! Attach, plan, demand and fetch together, with an OCI layout directory as the registry.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use proptest::prelude::*;
use tempfile::TempDir;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_registry::{Digest, Location};
use ublkimg_tests::fault_row::FaultRow;

use crate::fetch::BLOCKING_THREADS_MAX;
use crate::fixture::{Image, LayerContent, blob_path, read};
use crate::image::{Plan, Readiness};
use crate::{AttachOptions, Engine, ErrorKind, LoadedImage, Result, Store, attach, reopen};

/// A registry directory and a driver.
pub(crate) struct Rig {
    registry: TempDir,
    pub(crate) root: TempDir,
    pub(crate) store: Arc<Store>,
    pub(crate) engine: Engine,
    options: AttachOptions,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(root.path()).unwrap());
        Self {
            registry: tempfile::tempdir().unwrap(),
            engine: Engine::start(&store).unwrap(),
            store,
            root,
            options: AttachOptions::default(),
        }
    }

    pub(crate) fn push(&self, image: &Image, tag: &str) -> Location {
        self.engine.runtime().block_on(image.push(self.registry.path(), tag))
    }

    pub(crate) fn attach(&self, location: &Location) -> Result<LoadedImage> {
        self.engine.runtime().block_on(attach(&self.store, &self.engine, location, &self.options))
    }

    fn reopen(&self, location: &Location, manifest: Digest) -> Result<LoadedImage> {
        self.engine.runtime().block_on(reopen(&self.store, &self.engine, location, manifest, None, &self.options))
    }

    /// Ends the processes and starts them again on the same store.
    pub(crate) fn restart(self) -> Self {
        let Self { registry, root, store, engine, options } = self;
        engine.stop();
        drop(store);
        let store = Arc::new(Store::open(root.path()).unwrap());
        let engine = Engine::start(&store).unwrap();
        Self { registry, root, store, engine, options }
    }
}

fn two_layers() -> Image {
    Image::new(&[LayerContent::new(1, &[64, 3, 64, 1, 17]), LayerContent::new(2, &[5; 40])])
}

fn blocks(image: &Image, start: usize, len: usize) -> &[u8] {
    &image.device[start * BLOCK_SIZE..(start + len) * BLOCK_SIZE]
}

pub(crate) fn device_blocks(image: &Image) -> u32 {
    u32::try_from(image.device.len() / BLOCK_SIZE).unwrap()
}

/// An address that refuses connections.
fn nobody() -> Location {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("{}/image:tag", listener.local_addr().unwrap()).parse().unwrap()
}

#[test]
fn every_byte_of_the_device_is_the_images() {
    let rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let loaded = rig.attach(&location).unwrap();
    assert_eq!(loaded.image.total_blocks(), device_blocks(&image));
    assert_eq!(loaded.image.statistics().registry_requests, 3, "index, manifest, metadata");
    for start in (0..device_blocks(&image)).step_by(37) {
        let len = (device_blocks(&image) - start).min(41);
        let expected = blocks(&image, start as usize, len as usize);
        assert!(read(&loaded.image, start, len).unwrap() == expected, "{len} blocks at {start}");
    }
    let first = loaded.image.statistics();
    assert_eq!((first.fetched_chunks, first.verification_failures, first.errors), (45, 0, 0));
    assert_eq!(first.registry_requests, 3 + 45);
    assert!(first.misses > 0 && first.hits > 0, "{first:?}");
    let again = read(&loaded.image, 0, device_blocks(&image)).unwrap();
    assert!(again == image.device);
    assert_eq!(loaded.image.statistics().registry_requests, first.registry_requests, "nothing is fetched twice");
    assert_eq!(rig.engine.counters().duplicates, 0);
    let (stored, all) = loaded.image.stored_bytes();
    assert_eq!(stored, all);
}

#[test]
fn a_forged_chunk_index_does_not_reach_an_image_with_the_same_layers() {
    let honest = two_layers();
    let contents = [LayerContent::new(3, &[64, 3, 64, 1, 17]), LayerContent::new(4, &[5; 40])];
    let forged = Image::forged(&contents, &honest);
    let names = |image: &Image| image.manifest.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
    assert_eq!(names(&forged), names(&honest));
    for forged_first in [true, false] {
        let (rig, registry) = (Rig::new(), tempfile::tempdir().unwrap());
        let of_forged = rig.engine.runtime().block_on(forged.push(registry.path(), "v1"));
        let mut both = [(&forged, of_forged), (&honest, rig.push(&honest, "v1"))];
        if !forged_first {
            both.reverse();
        }
        let fault = FaultRow::begins("a forged chunk index for a layer of another image");
        let loaded = both.map(|(image, location)| {
            let loaded = rig.attach(&location).unwrap();
            assert!(read(&loaded.image, 0, device_blocks(image)).unwrap() == image.device);
            (image, loaded)
        });
        fault.ends("the other image reads right bytes");
        for (image, loaded) in &loaded {
            assert!(read(&loaded.image, 0, device_blocks(image)).unwrap() == image.device, "both are in the store");
        }
    }
}

#[test]
fn there_are_so_many_images_and_then_no_more() {
    let rig = Rig::new();
    let location = rig.push(&two_layers(), "v1");
    let mut loaded: Vec<_> = (0..crate::engine::IMAGES_MAX).map(|_| rig.attach(&location).unwrap()).collect();
    let refused = rig.attach(&location).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.chain().contains("remove one first"), "{}", refused.chain());
    loaded.pop();
    rig.attach(&location).unwrap();
}

#[test]
fn attaching_waits_for_memory_that_others_have() {
    let rig = Rig::new();
    let location = rig.push(&two_layers(), "v1");
    let memory = rig.store.memory();
    for budget in [&memory.stored, &memory.raw] {
        let all = rig.engine.runtime().block_on(budget.take(u64::MAX)).unwrap();
        let options = AttachOptions { attach_deadline: Duration::from_millis(300), ..AttachOptions::default() };
        let waits = rig.engine.runtime().block_on(attach(&rig.store, &rig.engine, &location, &options));
        assert_eq!(waits.unwrap_err().kind(), ErrorKind::TimedOut);
        drop(all);
        rig.attach(&location).unwrap();
        assert!(budget.try_take(u64::MAX).is_some(), "it is given back");
    }
}

#[test]
fn attached_images_keep_so_much_memory_and_the_next_is_refused() {
    let rig = Rig::new();
    let location = rig.push(&two_layers(), "v1");
    let kept = &rig.store.memory().kept;
    let all = kept.try_take(u64::MAX).unwrap();
    let refused = rig.attach(&location).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.chain().contains("remove one first"), "{}", refused.chain());
    drop(all);
    let loaded = rig.attach(&location).unwrap();
    assert!(kept.try_take(u64::MAX).is_none(), "it has its share");
    drop(loaded);
    assert!(kept.try_take(u64::MAX).is_some(), "it has given it back");
}

#[test]
fn so_many_things_that_may_block_go_on_at_once() {
    let rig = Rig::new();
    let (begun, may_end) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let work = |_| {
        let (begun, may_end) = (Arc::clone(&begun), Arc::clone(&may_end));
        rig.engine.runtime().spawn_blocking(move || {
            begun.fetch_add(1, Ordering::SeqCst);
            while !may_end.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let all: Vec<_> = (0..2 * BLOCKING_THREADS_MAX).map(work).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while begun.load(Ordering::SeqCst) < BLOCKING_THREADS_MAX && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(begun.load(Ordering::SeqCst), BLOCKING_THREADS_MAX, "the others wait");
    may_end.store(true, Ordering::SeqCst);
    for one in all {
        rig.engine.runtime().block_on(one).unwrap();
    }
    assert_eq!(begun.load(Ordering::SeqCst), 2 * BLOCKING_THREADS_MAX);
}

#[test]
fn past_the_end_there_are_zeros() {
    let rig = Rig::new();
    let image = two_layers();
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    let end = loaded.image.total_blocks();
    assert_eq!(read(&loaded.image, end - 1, 3).unwrap(), vec![0; 3 * BLOCK_SIZE]);
    assert_eq!(read(&loaded.image, u32::MAX, 2).unwrap(), vec![0; 2 * BLOCK_SIZE]);
}

#[test]
fn what_was_evicted_is_fetched_again_when_it_is_read() {
    let rig = Rig::new();
    let image = two_layers();
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    let all = device_blocks(&image);
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    let nothing = std::collections::BTreeSet::new();
    let needed = std::collections::BTreeSet::from([ublkimg_image::Sha256(loaded.manifest_digest.0)]);
    let freed = rig.store.make_room(u64::MAX, &nothing, &needed).unwrap();
    assert_eq!((freed, loaded.image.stored_bytes().0), (349 * 4096, 0));
    std::thread::scope(|scope| {
        // Readers while it goes on.
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| (0..10).for_each(|_| assert!(read(&loaded.image, 0, all).unwrap() == image.device)))
            })
            .collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            rig.store.make_room(20 * 4096, &nothing, &needed).unwrap();
            // A read of the whole device is to have a chance.
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert_eq!(rig.store.check().unwrap().damaged_blocks, 0);
}

#[test]
fn a_full_disk_and_a_broken_one_are_served_from_memory() {
    let rig = Rig::new();
    let image = two_layers();
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    let all = device_blocks(&image);
    crate::store::journal::set_trouble(rig.root.path(), Some(|_| Some(rustix::io::Errno::NOSPC)));
    let fault = FaultRow::begins("cache disk full");
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    fault.ends("served from memory: data");
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    assert_eq!(loaded.image.statistics().fetched_chunks, 45, "what is in memory is not fetched again");
    assert_eq!((loaded.image.stored_bytes().0, rig.store.room().unwrap().overflowed_chunks), (0, 45));
    crate::store::journal::set_trouble(rig.root.path(), Some(|_| Some(rustix::io::Errno::IO)));
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    crate::store::journal::set_trouble(rig.root.path(), None);
    drop(loaded);
    let rig = rig.restart();
    assert_eq!(rig.store.check().unwrap().damaged_blocks, 0);
}

#[test]
fn blocks_that_the_disk_cannot_read_are_fetched_again() {
    let rig = Rig::new();
    let image = two_layers();
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    let all = device_blocks(&image);
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    // As a device does that met an error.
    assert!(loaded.image.cannot_read(1, 0, 8192));
    assert!(!loaded.image.cannot_read(0, 0, 4096), "the metadata image is not fetched in parts");
    let fault = FaultRow::begins("cache disk fails to read");
    assert!(read(&loaded.image, 0, all).unwrap() == image.device);
    fault.ends("fetched again, kept in memory: data");
    assert_eq!(loaded.image.statistics().fetched_chunks, 46);
}

#[test]
fn many_readers_of_one_image_fetch_each_chunk_once() {
    let rig = Rig::new();
    let image = two_layers();
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let (image, served) = (&image, &loaded.image);
            scope.spawn(move || {
                for step in 0..40 {
                    let start = (step * 17 + thread * 5) % (device_blocks(image) - 8);
                    assert!(read(served, start, 8).unwrap() == blocks(image, start as usize, 8));
                }
            });
        }
    });
    let fetched = loaded.image.statistics().fetched_chunks;
    assert!(fetched <= 45, "{fetched}");
    assert_eq!(loaded.image.statistics().registry_requests, 3 + fetched);
}

#[test]
fn a_sequential_reader_is_read_ahead_of() {
    let rig = Rig::new();
    let image = Image::new(&[LayerContent::new(3, &[4; 200])]);
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    let first = device_blocks(&image) - 256 - 800;
    for block in 0..200 {
        read(&loaded.image, first + block * 4, 4).unwrap();
    }
    let counters = rig.engine.counters();
    assert!(counters.read_ahead > 150, "{counters:?}");
    assert_eq!(loaded.image.statistics().fetched_chunks, 200);
}

#[test]
fn a_changed_chunk_is_an_error_and_its_neighbours_read() {
    let rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let loaded = rig.attach(&location).unwrap();
    let first = device_blocks(&image) - 256 - 200 - 149;
    // Spoil the second chunk of the first layer blob: its blocks 64 to 66.
    let path = blob_path(rig.registry.path(), loaded.manifest.layers[0].digest);
    let good = fs::read(&path).unwrap();
    let frame = zstd::bulk::compress(blocks(&image, first as usize + 64, 3), 1).unwrap();
    let at = good.windows(frame.len()).position(|window| window == frame).unwrap();
    let mut bad = good.clone();
    bad[at + frame.len() / 2] ^= 0x10;
    fs::write(&path, bad).unwrap();
    assert_eq!(read(&loaded.image, first + 65, 1), Err(libc::EIO));
    assert_eq!(read(&loaded.image, first + 60, 8), Err(libc::EIO), "a request that needs it among others");
    assert_eq!(loaded.image.statistics().verification_failures, 1, "it is not fetched again at once");
    assert!(read(&loaded.image, first, 64).unwrap() == blocks(&image, first as usize, 64));
    assert!(read(&loaded.image, first + 67, 64).unwrap() == blocks(&image, first as usize + 67, 64));
    fs::write(&path, good).unwrap();
    std::thread::sleep(ublkimg_scheduler::FAILURE_HOLD);
    assert!(read(&loaded.image, first + 60, 8).unwrap() == blocks(&image, first as usize + 60, 8), "a later read");
}

#[test]
fn a_shared_layer_is_fetched_once_and_outlives_the_image_that_brought_it() {
    let rig = Rig::new();
    let shared = || LayerContent::new(7, &[16; 6]);
    let (one, two) = (Image::new(&[shared()]), Image::new(&[LayerContent::new(8, &[3; 3]), shared()]));
    let (of_one, of_two) = (rig.push(&one, "one"), rig.push(&two, "two"));
    let (first, second) = (rig.attach(&of_one).unwrap(), rig.attach(&of_two).unwrap());
    read(&first.image, 0, 40).unwrap();
    assert!(first.image.statistics().fetched_chunks > 0);
    drop(first);
    assert!(read(&second.image, 0, device_blocks(&two)).unwrap() == two.device);
    assert_eq!(rig.engine.counters().fetched, 3 + 6);
}

#[test]
fn one_layer_twice_in_an_image_is_one_file() {
    let rig = Rig::new();
    let image = Image::new(&[LayerContent::new(7, &[16; 6]), LayerContent::new(7, &[16; 6])]);
    let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
    assert!(read(&loaded.image, 0, device_blocks(&image)).unwrap() == image.device);
    assert_eq!(loaded.image.statistics().fetched_chunks, 6);
}

#[test]
fn a_restart_needs_no_registry_for_what_is_stored() {
    let rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let loaded = rig.attach(&location).unwrap();
    read(&loaded.image, 0, 100).unwrap();
    let digest = loaded.manifest_digest;
    drop(loaded);
    let mut rig = rig.restart();
    rig.options.read_deadline = Duration::from_millis(300);
    rig.options.attach_deadline = Duration::from_millis(100);
    let loaded = rig.reopen(&nobody(), digest).unwrap();
    assert_eq!(loaded.image.statistics().registry_requests, 0);
    assert!(read(&loaded.image, 0, 100).unwrap() == blocks(&image, 0, 100));
    assert_eq!((loaded.image.statistics().hits, loaded.image.statistics().misses), (1, 0));
    let start = Instant::now();
    assert_eq!(read(&loaded.image, 250, 1), Err(libc::EIO), "what is missing waits for the deadline");
    assert!(start.elapsed() >= Duration::from_millis(100) && start.elapsed() < Duration::from_secs(3));
}

/// Makes what the store keeps whole look as old as what may go when room is needed.
fn age(rig: &Rig) {
    for directory in ["objects", "metadata"] {
        for entry in fs::read_dir(rig.root.path().join(directory)).unwrap() {
            let file = fs::File::options().write(true).open(entry.unwrap().path()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
        }
    }
}

#[test]
fn what_is_attached_can_be_taken_back_also_if_room_was_made_before_there_was_a_record() {
    let mut rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let digest = rig.attach(&location).unwrap().manifest_digest;
    age(&rig);
    for was_known in [false, true] {
        let loaded = if was_known { rig.reopen(&location, digest) } else { rig.attach(&location) }.unwrap();
        // By somebody who has looked for records before there was one of this image.
        rig.store.make_room(u64::MAX, &BTreeSet::new(), &BTreeSet::new()).unwrap();
        drop(loaded);
        rig = rig.restart();
        let loaded = rig.reopen(&location, digest).unwrap();
        assert!(read(&loaded.image, 0, 100).unwrap() == blocks(&image, 0, 100));
        age(&rig);
    }
    rig.store.make_room(u64::MAX, &BTreeSet::new(), &BTreeSet::new()).unwrap();
    assert_eq!(rig.reopen(&location, digest).unwrap_err().kind(), ErrorKind::NotFound, "nobody holds them any more");
}

#[test]
fn attaching_again_fetches_the_index_only() {
    let rig = Rig::new();
    let location = rig.push(&two_layers(), "v1");
    drop(rig.attach(&location).unwrap());
    assert_eq!(rig.attach(&location).unwrap().image.statistics().registry_requests, 1);
}

/// Sends a demand for a block that nobody can deliver; the receiver gets its outcome.
fn hopeless_demand(rig: &Rig) -> (LoadedImage, crossbeam::channel::Receiver<Result<(), i32>>) {
    let location = rig.push(&two_layers(), "v1");
    let digest = rig.attach(&location).unwrap().manifest_digest;
    let loaded = rig.reopen(&nobody(), digest).unwrap();
    let (woken, wakes) = crossbeam::channel::bounded(1);
    let mut plan = Plan::new();
    assert_eq!(loaded.image.plan(20, 1, &mut plan), Readiness::Missing);
    let waited = loaded.image.wait(&mut loaded.image.begin(20, 1));
    loaded.image.demand(&plan, waited, Box::new(move |outcome| woken.send(outcome).unwrap()));
    assert!(wakes.recv_timeout(Duration::from_millis(50)).is_err(), "still waiting");
    (loaded, wakes)
}

#[test]
fn detaching_wakes_who_waits() {
    let rig = Rig::new();
    let (loaded, wakes) = hopeless_demand(&rig);
    loaded.image.detach();
    assert_eq!(wakes.recv_timeout(Duration::from_secs(5)), Ok(Err(libc::EIO)));
    assert_eq!(read(&loaded.image, 20, 1), Err(libc::EIO));
    assert!(read(&loaded.image, 0, 1).is_ok(), "the metadata still reads");
}

#[test]
fn stopping_the_engine_wakes_who_waits() {
    let rig = Rig::new();
    let (loaded, wakes) = hopeless_demand(&rig);
    rig.engine.stop();
    assert_eq!(wakes.recv_timeout(Duration::from_secs(5)), Ok(Err(libc::EIO)));
    assert_eq!(read(&loaded.image, 20, 1), Err(libc::EIO));
}

#[test]
fn another_image_takes_over_when_the_first_is_removed() {
    let rig = Rig::new();
    let image = two_layers();
    let (hopeless, wakes) = hopeless_demand(&rig);
    let good = rig.attach(&rig.push(&image, "v1")).unwrap();
    hopeless.image.detach();
    assert_eq!(wakes.recv_timeout(Duration::from_secs(5)), Ok(Ok(())), "fetched from the other image's registry");
    assert!(read(&good.image, 20, 1).unwrap() == blocks(&image, 20, 1));
}

#[test]
fn an_outage_of_one_registry_does_not_hold_up_another() {
    let mut rig = Rig::new();
    rig.options.attach_deadline = Duration::from_secs(1);
    rig.options.read_deadline = Duration::from_secs(6);
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let digest = rig.attach(&location).unwrap().manifest_digest;
    let unreachable = rig.reopen(&nobody(), digest).unwrap();
    let reachable = rig.attach(&location).unwrap();
    let (start, len) = (device_blocks(&image) / 2, 4);
    assert!(read(&reachable.image, start, len).unwrap() == blocks(&image, start as usize, len as usize));
    drop(unreachable);
}

#[test]
fn a_metadata_image_that_was_changed_in_the_store_is_not_served() {
    let rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    drop(rig.attach(&location).unwrap());
    let file = fs::read_dir(rig.root.path().join("metadata")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&file).unwrap();
    bytes[2000] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let fault = FaultRow::begins("a metadata image that was changed in the store");
    let loaded = rig.attach(&location).unwrap();
    assert!(read(&loaded.image, 0, 1).unwrap() == blocks(&image, 0, 1));
    fault.ends("made again: data");
}

#[test]
fn what_contradicts_itself_is_refused() {
    type Spoil = fn(&mut Image);
    let spoil: [(&str, Spoil); 6] = [
        ("index digest", |image| image.manifest.layers[1].index_digest = Digest::of(b"other")),
        ("index range", |image| image.manifest.layers[0].index_range.start -= 1),
        ("order of layers", |image| image.manifest.layers.swap(0, 1)),
        ("bundle without a layer", |image| image.rebundle(|bundle| drop(bundle.layers.pop()))),
        ("device table", |image| {
            let other = Image::new(&[LayerContent::new(1, &[64, 3, 64, 1, 18]), LayerContent::new(2, &[5; 40])]);
            let layers = other.manifest.layers.clone();
            let reference = &other.manifest.metadata;
            let start = usize::try_from(reference.bundle_range.start).unwrap();
            let bundle = &other.blobs[&reference.digest][start + 8..];
            let bundle = ublkimg_image::Bundle::decode(bundle).unwrap();
            image.rebundle(|spoilt| *spoilt = bundle);
            image.manifest.layers = layers;
        }),
        ("bundle range", |image| image.manifest.metadata.bundle_range.start -= 1),
    ];
    for (what, spoil) in spoil {
        let rig = Rig::new();
        let mut image = two_layers();
        spoil(&mut image);
        let fault = FaultRow::begins("manifest, index and device table contradict each other");
        let error = rig.attach(&rig.push(&image, "v1")).unwrap_err();
        fault.ends("the command fails");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {}", error.chain());
    }
}

#[test]
fn a_damaged_metadata_blob_is_refused_and_not_kept() {
    let rig = Rig::new();
    let image = two_layers();
    let location = rig.push(&image, "v1");
    let path = blob_path(rig.registry.path(), image.manifest.metadata.digest);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[20] ^= 1;
    fs::write(&path, bad).unwrap();
    let fault = FaultRow::begins("a damaged metadata blob");
    assert_eq!(rig.attach(&location).unwrap_err().kind(), ErrorKind::Corrupt);
    fault.ends("the command fails, and it is not kept");
    fs::write(&path, good).unwrap();
    assert!(rig.attach(&location).is_ok());
}

#[test]
fn what_is_not_there_or_not_ours_says_so() {
    let mut rig = Rig::new();
    rig.options.attach_deadline = Duration::from_millis(200);
    let image = two_layers();
    rig.push(&image, "v1");
    let missing = Location::Layout { dir: rig.registry.path().to_owned(), tag: Some("v2".to_owned()) };
    assert_eq!(rig.attach(&missing).unwrap_err().kind(), ErrorKind::NotFound);
    let refused = rig.attach(&nobody()).unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut), "{}", refused.chain());
    let unknown = rig.reopen(&nobody(), Digest::of(b"never seen")).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
    rig.options.platform = "linux/s390x".parse().unwrap();
    let tagged = Location::Layout { dir: rig.registry.path().to_owned(), tag: Some("v1".to_owned()) };
    assert_eq!(rig.attach(&tagged).unwrap_err().kind(), ErrorKind::NotFound);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn random_reads_are_the_images(
        layers in prop::collection::vec(prop::collection::vec(1..65_usize, 1..6), 0..4),
        reads in prop::collection::vec((any::<u32>(), 1..257_u32), 1..20),
    ) {
        let rig = Rig::new();
        let contents = layers.iter().zip(1..).map(|(chunks, seed)| LayerContent::new(seed, chunks));
        let image = Image::new(&contents.collect::<Vec<_>>());
        let loaded = rig.attach(&rig.push(&image, "v1")).unwrap();
        for (start, len) in reads {
            let start = start % device_blocks(&image);
            let len = len.min(device_blocks(&image) - start);
            prop_assert!(read(&loaded.image, start, len).unwrap() == blocks(&image, start as usize, len as usize));
        }
    }
}
