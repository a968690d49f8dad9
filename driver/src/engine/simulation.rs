//! The whole path of a read in one thread, in an order that a seed chooses: devices that read, the engine, fetches,
//! decoders, the store with its syncs and evictions, images that come and go, time, faults of all of these, and `kill -9`.
//!
//! Each of them does one small thing when it is its turn. While the store is at work on its disk, the others go on before
//! and after each step, as far as they may: queue threads, the engine and fetches take no lock that is held there. So
//! every order in which a message, a bit or a byte can become visible is tried by some seed, save what a processor may
//! reorder. The code is the real one, but for the network (`registry/tests/faults` and `outage_tests` are about that), the
//! clock, and threads.
//!
//! What must hold: a read gets the right bytes, or an error that a fault accounts for; nothing is fetched while it is on its
//! way; a kill loses nothing that a reader has seen; when the faults are over, nobody is left waiting.
//!
//! `UBLKIMG_SIMULATION_SEEDS` says how many seeds are tried (`make simulation`), `UBLKIMG_SIMULATION_SEED` which one.

mod devices;
mod network;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::unbounded;
use tempfile::TempDir;
use ublkimg_registry::{ClientOptions, Location, Repository};

use self::devices::{Device, Reader};
use self::network::Network;
use super::*;
use crate::decode;
use crate::fetch::{Outcome, Progress};
use crate::fixture::{Image, LayerContent, layer_blob};
use crate::random::Random;
use crate::store::{Store, journal};

const STEPS: u32 = 2500;

const READERS: u16 = 6;

/// The scheduler holds a chunk that failed back for so long.
const FAILURE_HOLD_MS: u64 = 1500;

thread_local! {
    /// The life that goes on, for who evicts and waits for reads.
    static LIFE: RefCell<Weak<Life>> = const { RefCell::new(Weak::new()) };
}

/// Somebody is about to evict what a queue may be reading.
fn end_linked_reads(which: usize) {
    if let Some(life) = LIFE.with_borrow(Weak::upgrade) {
        life.end_linked_reads(which);
    }
}

/// What ends a run that is killed.
struct Killed;

/// What is the same in all lives of a daemon.
struct Host {
    root: TempDir,
    _registry: TempDir,
    repository: Repository,
    /// Two images that share their first layer.
    images: [Image; 2],
    layers: [[usize; 2]; 2],
    blobs: Vec<(Vec<u8>, Arc<ChunkIndex>)>,
}

impl Host {
    fn new() -> Self {
        let content = |layer: u64| match layer {
            0 => LayerContent::new(1, &[1, 64, 7, 64, 3]),
            1 => LayerContent::new(2, &[5; 12]),
            _ => LayerContent::new(3, &[64, 1, 1, 30]),
        };
        let layers = [[0, 1], [0, 2]];
        let images = layers.map(|layers| Image::new(&layers.map(|layer| content(layer as u64))));
        let blob = |(blob, bundled): (Vec<u8>, ublkimg_image::BundledLayer)| (blob, Arc::new(bundled.index));
        let blobs = (0..3).map(|layer| blob(layer_blob(&content(layer)))).collect();
        let registry = tempfile::tempdir().unwrap();
        let location = Location::Layout { dir: registry.path().to_owned(), tag: None };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // Nothing comes from it: a repository is what a source has.
        runtime.block_on(images[0].push(registry.path(), "v1"));
        let repository = runtime.block_on(Repository::open(&location, &ClientOptions::default())).unwrap();
        let in_memory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self { root: in_memory.unwrap(), _registry: registry, repository, images, layers, blobs }
    }
}

/// One life of a daemon and what it serves.
struct Life {
    host: Rc<Host>,
    random: Rc<RefCell<Random>>,
    /// What happened, to be printed when something is wrong.
    log: Rc<RefCell<VecDeque<String>>>,
    clock_ms: Arc<AtomicU64>,
    /// When something last went wrong that a reader may notice.
    fault_ms: Rc<Cell<u64>>,
    has_faults: bool,
    store: Arc<Store>,
    engine: RefCell<EngineThread>,
    handle: EngineHandle,
    inbox: Inbox,
    network: RefCell<Network>,
    devices: RefCell<[Option<Device>; 2]>,
    readers: RefCell<Vec<Reader>>,
}

impl Life {
    fn begin(before: &Past, readers: Vec<Reader>, has_faults: bool) -> Rc<Self> {
        let (demands, demanded) = bounded(DEMANDS_MAX);
        let (touches, touched) = bounded(TOUCHES_MAX);
        let (controls, controlled) = unbounded();
        let (progress, progressed) = unbounded();
        journal::set_trouble(before.host.root.path(), None);
        let store = before.open_store();
        for ((_, index), stored) in before.host.blobs.iter().zip(before.stored.take()) {
            let file = store.blob(index.digest(), index.raw_len_blocks()).unwrap();
            let lost = stored.into_iter().find(|block| !file.holds(*block..*block + 1));
            assert_eq!(lost, None, "a block that was there is lost by a kill");
        }
        let network = Network::new(progress);
        let (clock_ms, jobs, copies) = (Arc::clone(&before.clock_ms), network.jobs(), network.copies());
        let world = World {
            start: std::time::Instant::now(),
            elapsed: Box::new(move || std::time::Duration::from_millis(clock_ms.load(Ordering::Relaxed))),
            fetch: Box::new(move |job| jobs.send(job).unwrap()),
            copy: Box::new(move |job| copies.send(job).unwrap()),
        };
        let places = Arc::clone(store.chunk_places());
        let life = Rc::new(Self {
            host: Rc::clone(&before.host),
            random: Rc::clone(&before.random),
            log: Rc::clone(&before.log),
            clock_ms: Arc::clone(&before.clock_ms),
            fault_ms: Rc::clone(&before.fault_ms),
            has_faults,
            store,
            engine: RefCell::new(EngineThread::new(world, places)),
            handle: EngineHandle { demands, touches, controls, next_image: Arc::default() },
            inbox: Inbox { demanded, touched, controlled, progressed },
            network: RefCell::new(network),
            devices: RefCell::default(),
            readers: RefCell::new(readers),
        });
        life.attach(0);
        life.attach(1);
        life
    }

    fn below(&self, end: u64) -> u64 {
        self.random.borrow_mut().below(end)
    }

    /// Whether something happens now that does so once in `times`.
    fn happens(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn now_ms(&self) -> u64 {
        self.clock_ms.load(Ordering::Relaxed)
    }

    fn note(&self, what: impl FnOnce() -> String) {
        let mut log = self.log.borrow_mut();
        log.push_back(what());
        if log.len() > 60 {
            log.pop_front();
        }
    }

    /// A reader may notice this.
    fn note_fault(&self, what: impl FnOnce() -> String) {
        self.fault_ms.set(self.now_ms());
        self.note(what);
    }

    /// One thing that waits for nobody and takes no lock of the store.
    fn small_step(&self) {
        match self.below(10) {
            0..3 => self.read(),
            3 => self.look_at_news(),
            4 => self.end_linked_reads(usize::try_from(self.below(2)).unwrap()),
            5..8 => self.engine_takes_one(),
            _ => self.network.borrow_mut().step(self),
        }
    }

    fn step(&self) {
        match self.below(40) {
            0..8 => self.decode(),
            8 => self.sync(),
            9 | 10 => self.evict(),
            11 => self.pass_time(),
            12 => self.plan_or_fill(),
            13 if self.has_faults && self.happens(4) => self.come_or_go(),
            14 if self.has_faults && self.happens(4) => self.disk_trouble(),
            15 if self.has_faults && self.happens(10) => self.cannot_read(),
            _ => self.small_step(),
        }
    }

    /// The engine takes a message, of any of those who sent one.
    fn engine_takes_one(&self) {
        let Ok(mut engine) = self.engine.try_borrow_mut() else { return };
        match self.below(4) {
            0 => drop(self.inbox.demanded.try_recv().map(|demand| engine.demand(demand))),
            1 => drop(self.inbox.touched.try_recv().map(|(image, chunk)| engine.touch(image, chunk))),
            2 => drop(self.inbox.controlled.try_recv().map(|control| engine.control(control))),
            _ => drop(self.inbox.progressed.try_recv().map(|news| {
                if let Progress::Ended { chunk, outcome: outcome @ (Outcome::Failed(_) | Outcome::Refused(_)) } = news {
                    // From now on the scheduler holds the chunk back.
                    self.note_fault(|| format!("{chunk:?}: {outcome:?}"));
                }
                engine.progress(news);
            })),
        }
    }

    /// A decoder takes one of the chunks that have arrived.
    fn decode(&self) {
        let taken = self.network.borrow_mut().take_arrived(&mut self.random.borrow_mut());
        let Some(job) = taken else { return };
        let chunk = job.chunk();
        self.note(|| format!("decode {chunk:?}"));
        let progress = self.network.borrow().progress();
        let store = Arc::downgrade(&self.store);
        decode::end(job, &mut zstd::bulk::Decompressor::new().unwrap(), &mut Vec::new(), &progress, &store);
        self.network.borrow_mut().is_over(chunk);
        self.note(|| format!("decoded {chunk:?}"));
    }

    fn some_blob(&self) -> Option<Arc<BlobFile>> {
        let devices = self.devices.borrow();
        let files = devices.iter().flatten().flat_map(Device::files).collect::<Vec<_>>();
        (!files.is_empty()).then(|| Arc::clone(files[self.random.borrow_mut().index(files.len())]))
    }

    fn sync(&self) {
        if let Some(Err(error)) = self.some_blob().map(|blob| blob.sync()) {
            self.note_fault(|| format!("sync: {:?}", error.kind()));
        }
    }

    fn evict(&self) {
        let Some(blob) = self.some_blob() else { return };
        let start = u32::try_from(self.below(u64::from(blob.blocks()))).unwrap();
        let end = (start + 1 + u32::try_from(self.below(64)).unwrap()).min(blob.blocks());
        self.note(|| format!("evict {start}..{end} of {}", blob.index_digest()));
        if let Err(error) = blob.evict(std::slice::from_ref(&(start..end))) {
            self.note_fault(|| format!("evict: {:?}", error.kind()));
        }
        self.note(|| "evicted".to_owned());
    }

    /// Time passes, at times until the scheduler wants to know.
    fn pass_time(&self) {
        let due = self.engine.borrow().wake_at().map(|at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX) + 1);
        let now_ms = self.now_ms() + self.below(30);
        let now_ms =
            if self.happens(4) { due.map_or(now_ms, |due| due.max(now_ms).min(now_ms + 5000)) } else { now_ms };
        self.clock_ms.store(now_ms, Ordering::Relaxed);
        if due.is_some_and(|due| due <= now_ms) {
            self.engine.borrow_mut().tick();
        }
    }

    fn disk_trouble(&self) {
        let full: journal::Trouble = |_| Some(rustix::io::Errno::NOSPC);
        let trouble = self.happens(3).then_some(full);
        self.note_fault(|| format!("the disk is {}", if trouble.is_some() { "full" } else { "well" }));
        journal::set_trouble(self.host.root.path(), trouble);
    }

    /// When the faults are over everybody gets what they wait for.
    fn settle(&self) {
        journal::set_trouble(self.host.root.path(), None);
        for which in 0..2 {
            if self.devices.borrow()[which].is_none() {
                self.attach(which);
            }
        }
        for _ in 0..20_000 {
            self.decode();
            (0..8).for_each(|_| self.small_step());
            (0..2).for_each(|which| self.end_linked_reads(which));
            self.look_at_news();
            if self.readers.borrow().iter().all(Reader::is_done) {
                return;
            }
            if self.is_idle() {
                let waits = self.engine.borrow().wake_at();
                assert!(waits.is_some(), "somebody waits, and nobody is at work: {:?}", self.readers.borrow());
                self.clock_ms.fetch_add(1000, Ordering::Relaxed);
                self.engine.borrow_mut().tick();
            }
        }
        panic!("readers still wait: {:?}", self.readers.borrow());
    }

    /// The blocks of a layer that are on the disk.
    fn stored(&self, index: &ChunkIndex) -> Vec<u32> {
        let file = self.store.blob(index.digest(), index.raw_len_blocks()).unwrap();
        (0..file.blocks()).filter(|block| file.first_missing(*block..*block + 1).is_none()).collect()
    }

    /// Whether no message is under way and nothing is being fetched.
    fn is_idle(&self) -> bool {
        let Inbox { demanded, touched, controlled, progressed } = &self.inbox;
        let is_empty = demanded.is_empty() && touched.is_empty() && controlled.is_empty() && progressed.is_empty();
        is_empty && self.network.borrow().is_idle() && self.readers.borrow().iter().all(Reader::is_parked_or_done)
    }
}

/// What one life leaves to the next.
struct Past {
    host: Rc<Host>,
    random: Rc<RefCell<Random>>,
    log: Rc<RefCell<VecDeque<String>>>,
    clock_ms: Arc<AtomicU64>,
    fault_ms: Rc<Cell<u64>>,
    /// What the last life had in its store: of each layer, its blocks.
    stored: RefCell<Vec<Vec<u32>>>,
}

impl Past {
    /// The store of the next life. A program that another test starts at the moment has our open files until it runs, and so
    /// the lock of a store that is closed.
    fn open_store(&self) -> Arc<Store> {
        for _ in 0..500 {
            match Store::open(self.host.root.path()) {
                Err(error) if error.kind() == ErrorKind::Busy => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                opened => return Arc::new(opened.unwrap()),
            }
        }
        panic!("the killed daemon did not let go of its store");
    }
}

/// Lives of a daemon with this seed; what happened last.
fn run(seed: u64) -> Vec<String> {
    let past = Past {
        host: Rc::new(Host::new()),
        random: Rc::new(RefCell::new(Random::new(seed))),
        log: Rc::default(),
        // Not 0: that is when no fault was.
        clock_ms: Arc::new(AtomicU64::new(1)),
        fault_ms: Rc::default(),
        stored: RefCell::default(),
    };
    let mut readers: Vec<Reader> = (0..READERS).map(|_| Reader::default()).collect();
    for _ in 0..3 {
        let life = Life::begin(&past, readers, true);
        let lived = live(&life, || {
            for _ in 0..STEPS {
                life.step();
                if life.happens(u64::from(STEPS)) {
                    resume_unwind(Box::new(Killed));
                }
            }
        });
        life.note(|| if lived { "the daemon ends" } else { "kill -9" }.to_owned());
        readers = end(life, &past);
    }
    let life = Life::begin(&past, readers, false);
    let settled = live(&life, || {
        life.settle();
        life.readers.borrow_mut().iter_mut().for_each(Reader::read_everything);
        life.settle();
    });
    assert!(settled);
    end(life, &past);
    journal::forget(past.host.root.path());
    past.log.take().into()
}

/// Lives, with everything going on while the store is at work; false when it was killed.
fn live(life: &Rc<Life>, work: impl FnOnce()) -> bool {
    let among = Rc::downgrade(life);
    LIFE.set(Weak::clone(&among));
    journal::set_meanwhile(Some(Rc::new(move || {
        let Some(life) = among.upgrade() else { return };
        (0..life.below(4)).for_each(|_| life.small_step());
        if life.has_faults && life.happens(2000) {
            resume_unwind(Box::new(Killed));
        }
    })));
    let outcome = catch_unwind(AssertUnwindSafe(work));
    journal::set_meanwhile(None);
    LIFE.set(Weak::new());
    match outcome {
        Ok(()) => true,
        Err(payload) if payload.is::<Killed>() => false,
        Err(payload) => {
            life.log.borrow().iter().for_each(|line| println!("  {line}"));
            resume_unwind(payload)
        }
    }
}

/// Everything of a daemon goes, save what its readers asked the kernel for: it asks the next one.
fn end(life: Rc<Life>, past: &Past) -> Vec<Reader> {
    // The last sync, which a killed daemon does not make, is not to forget what it cannot write.
    journal::set_trouble(past.host.root.path(), None);
    past.stored.replace(past.host.blobs.iter().map(|(_, index)| life.stored(index)).collect());
    let mut readers = life.readers.take();
    readers.iter_mut().for_each(Reader::ask_again);
    let life = Rc::into_inner(life).expect("nobody else has it");
    // The engine first: who is detached afterwards finds nobody to tell.
    let Life { engine, inbox, network, devices, store, .. } = life;
    drop((engine, inbox, network, devices, store));
    readers
}

#[test]
fn in_whatever_order_things_happen_reads_are_right_and_nobody_waits_for_ever() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("UBLKIMG_SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("UBLKIMG_SIMULATION_SEEDS").unwrap_or(60),
    };
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let outcome = catch_unwind(|| run(seed));
        if let Err(payload) = outcome {
            println!("seed {seed} fails: UBLKIMG_SIMULATION_SEED={seed} repeats it");
            resume_unwind(payload);
        }
    }
    println!("{count} seeds: no wrong byte, nothing fetched twice at a time, nobody left waiting");
}

#[test]
fn a_seed_says_all_that_happens() {
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}
