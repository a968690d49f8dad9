//! Power cuts: a workload is written down step by step, and after every step the power goes.
//!
//! What a cut leaves is what was synced and an arbitrary part of the rest: each sector of a file has any of the contents
//! that it had since the last sync, its length likewise, and each name means any of the files that it meant since its
//! directory was synced. The store is opened on that: every block and object that it has must be right, and it must have
//! all that was durable. It then works on, and the power goes again.
//!
//! `UBLKIMG_POWERCUT_SEEDS` says how many workloads are cut (`make powercut`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ublkimg_image::BLOCK_SIZE;
use ublkimg_scheduler::Estimate;
use ublkimg_tests::fault_row;

use super::journal::Step;
use super::names::KnownName;
use super::*;
use crate::random::Random;

/// Blocks of the blob files: more than two words of a bitmap.
const BLOCKS: u32 = 150;
const BLOBS: u8 = 2;
const STEPS_PER_LIFE: u32 = 9;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

type Steps = Vec<(PathBuf, Step)>;
type Files = BTreeMap<PathBuf, Vec<u8>>;

/// What must survive, as it grows and shrinks: each change holds from a length of the journal on.
#[derive(Debug, Clone, Default)]
struct Promised {
    blocks: BTreeSet<(u8, u32)>,
    objects: BTreeSet<u8>,
    /// Objects that were written in this life.
    written: BTreeSet<u8>,
    /// The versions of which one must be there.
    small: BTreeMap<Small, BTreeSet<u8>>,
    /// Small things that were written in this life, and are durable after a sync.
    written_small: BTreeMap<Small, u8>,
}

/// What a store keeps beside blocks and objects, each in one of a few versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Small {
    Metadata,
    Name,
    Links,
    /// Those are durable at once.
    Pin,
    Trace,
}

impl Small {
    const ALL: [Self; 5] = [Self::Metadata, Self::Name, Self::Links, Self::Pin, Self::Trace];
    const VERSIONS: u8 = 3;

    fn name(version: u8) -> KnownName {
        KnownName { reference: "r/a:1".to_owned(), manifest: index_of(version).to_string(), profile: None }
    }

    fn links(version: u8) -> Vec<(String, Estimate)> {
        let bandwidth_bytes_per_second = 1000 + u64::from(version);
        vec![("link".to_owned(), Estimate { bandwidth_bytes_per_second, round_trip: Duration::from_millis(7) })]
    }

    fn pin(version: u8) -> Holding {
        let (objects, blobs) = ((0..100).map(index_of).collect(), [index_of(version)].into());
        Holding { reference: "r/a:1".to_owned(), manifest: index_of(9), objects, blobs }
    }

    fn put(self, store: &Store, version: u8) {
        match self {
            // As attaching does: one that is right is left alone.
            Self::Metadata if self.get(store) == Ok(Some(version)) => {}
            Self::Metadata => store.put_metadata(index_of(9), &object(version)).unwrap(),
            Self::Name => store.put_name(&Self::name(version)).unwrap(),
            Self::Links => store.put_links(&Self::links(version)).unwrap(),
            Self::Pin => store.pin(&Self::pin(version)).unwrap(),
            Self::Trace => drop(store.put_host_trace(index_of(9), index_of(9), &object(version)).unwrap()),
        }
    }

    /// The version that is there, if any; an error if it is none that was ever written.
    fn get(self, store: &Store) -> std::result::Result<Option<u8>, ()> {
        let is = |version: u8| match self {
            Self::Metadata => fs::read(store.layout.metadata(index_of(9))).ok().map(|bytes| bytes == object(version)),
            Self::Name => store.name("r/a:1").unwrap().map(|name| name == Self::name(version)),
            Self::Links => {
                let links = Some(store.links().unwrap()).filter(|links| !links.is_empty());
                links.map(|links| links == Self::links(version))
            }
            Self::Pin => store.pins().unwrap().first().map(|pin| *pin == Self::pin(version)),
            Self::Trace => store.host_trace(index_of(9), index_of(9)).unwrap().map(|bytes| bytes == object(version)),
        };
        match is(0) {
            None => Ok(None),
            Some(_) => (0..Self::VERSIONS).find(|version| is(*version) == Some(true)).map(Some).ok_or(()),
        }
    }
}

/// One life of a store: from a disk to its steps and promises.
struct Life {
    disk: Files,
    steps: Steps,
    promises: Vec<(usize, Promised)>,
    /// How long its store took to open.
    opened_in: Duration,
}

fn index_of(blob: u8) -> Sha256 {
    Sha256([blob; 32])
}

fn content(blob: u8, block: u32) -> Vec<u8> {
    (0..BLOCK_SIZE).map(|at| at.to_le_bytes()[0] ^ block.to_le_bytes()[0] ^ blob.wrapping_mul(85) ^ 0xA5).collect()
}

fn object(number: u8) -> Vec<u8> {
    vec![number; 1000 + usize::from(number) * 700]
}

/// A directory in memory where the host has one: the model decides what is lost, not the disk below.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// What is wrong with a store that was opened after a cut.
fn faults(store: &Store, promised: &Promised) -> Vec<String> {
    let mut faults = Vec::new();
    for blob in 0..BLOBS {
        let file = store.blob(index_of(blob), BLOCKS).unwrap();
        for block in 0..BLOCKS {
            let is_there = file.first_missing(block..block + 1).is_none();
            let mut bytes = vec![0; BLOCK_SIZE];
            std::os::unix::fs::FileExt::read_exact_at(&**file.file(), &mut bytes, u64::from(block) * BLOCK_SIZE as u64)
                .unwrap();
            if is_there && bytes != content(blob, block) {
                faults.push(format!("block {block} of blob {blob} is a lie"));
            }
            if !is_there && promised.blocks.contains(&(blob, block)) {
                faults.push(format!("block {block} of blob {blob} was durable and is forgotten"));
            }
        }
    }
    let checked = store.check().unwrap();
    // An object that was not synced may be there in part: it is taken for absent.
    if checked.damaged_blocks + checked.unknown_blocks > 0 {
        faults.push(format!("{checked:?}"));
    }
    for number in 0..8 {
        match store.object(Sha256::of(&object(number))).unwrap() {
            None if promised.objects.contains(&number) => faults.push(format!("object {number} is forgotten")),
            _ => {}
        }
    }
    for small in Small::ALL {
        let there = small.get(store);
        let promised = promised.small.get(&small);
        // A metadata image that was not synced may be there in part: it is compared when it is attached.
        if there.is_err() && (small != Small::Metadata || promised.is_some()) {
            faults.push(format!("{small:?} is a lie"));
        }
        if let (Some(versions), Ok(there)) = (promised, there)
            && !there.is_some_and(|there| versions.contains(&there))
        {
            faults.push(format!("{small:?} was durable in {versions:?}, and is {there:?}"));
        }
    }
    faults
}

/// Opens a store on `disk`, checks it, and works with it for a while.
fn live(disk: Files, promised: &Promised, boot: u8, random: &mut Random) -> Result<Life, Vec<String>> {
    let directory = directory();
    let root = directory.path().to_owned();
    for (path, bytes) in &disk {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    journal::begin(&root);
    let mut promised = Promised { written: BTreeSet::new(), written_small: BTreeMap::new(), ..promised.clone() };
    let mut promises = vec![(0, promised.clone())];
    let mut wrong = Vec::new();
    let began = Instant::now();
    let opened_in;
    {
        let store = Store::open_in_boot(&root, BootId([boot; 16])).unwrap();
        opened_in = began.elapsed();
        wrong.extend(faults(&store, &promised));
        let blobs: Vec<_> = (0..BLOBS).map(|blob| store.blob(index_of(blob), BLOCKS).unwrap()).collect();
        for _ in 0..STEPS_PER_LIFE {
            work(&store, &blobs, &mut promised, &mut promises, random);
        }
        if random.below(2) == 0 {
            sync(&store, &blobs, &mut promised);
            promises.push((journal::len(&root), promised.clone()));
        } else {
            // As `kill -9` leaves it: no last sync.
            store.blobs.lock().clear();
            store.unsynced.files.lock().clear();
        }
    }
    let steps = journal::end(&root);
    let relative = |path: &Path| path.strip_prefix(&root).unwrap().to_owned();
    let relative_step = |step| match step {
        Step::Rename { to } => Step::Rename { to: relative(&to) },
        other => other,
    };
    let steps = steps.into_iter().map(|(path, step)| (relative(&path), relative_step(step))).collect();
    if wrong.is_empty() { Ok(Life { disk, steps, promises, opened_in }) } else { Err(wrong) }
}

fn sync(store: &Store, blobs: &[Arc<BlobFile>], promised: &mut Promised) {
    store.sync().unwrap();
    promised.blocks.extend(present(blobs));
    promised.objects.extend(&promised.written);
    promised.small.extend(promised.written_small.iter().map(|(small, version)| (*small, [*version].into())));
}

fn present(blobs: &[Arc<BlobFile>]) -> Vec<(u8, u32)> {
    let of_blob = |(blob, file): (u8, &Arc<BlobFile>)| -> Vec<(u8, u32)> {
        let is_there = |block: &u32| file.first_missing(*block..block + 1).is_none();
        (0..BLOCKS).filter(is_there).map(|block| (blob, block)).collect()
    };
    (0..BLOBS).zip(blobs).flat_map(of_blob).collect()
}

/// One random thing that a store is asked for.
fn work(
    store: &Store,
    blobs: &[Arc<BlobFile>],
    promised: &mut Promised,
    promises: &mut Vec<(usize, Promised)>,
    random: &mut Random,
) {
    let root = store.layout.lock();
    let blob = u8::try_from(random.below(u64::from(BLOBS))).unwrap();
    let file = &blobs[usize::from(blob)];
    match random.below(14) {
        0..4 => {
            let start = u32::try_from(random.below(u64::from(BLOCKS))).unwrap();
            let end = (start + 1 + u32::try_from(random.below(40)).unwrap()).min(BLOCKS);
            let data: Vec<u8> = (start..end).flat_map(|block| content(blob, block)).collect();
            file.write(start, &data).unwrap();
        }
        4..6 => {
            let synced: Vec<_> = present(blobs).into_iter().filter(|(of, _)| *of == blob).collect();
            file.sync().unwrap();
            promised.blocks.extend(synced);
        }
        6 => {
            let number = u8::try_from(random.below(8)).unwrap();
            store.put_object(Sha256::of(&object(number)), &object(number)).unwrap();
            promised.written.insert(number);
        }
        7 => sync(store, blobs, promised),
        8 | 9 => {
            let start = u32::try_from(random.below(u64::from(BLOCKS))).unwrap();
            let end = (start + 1 + u32::try_from(random.below(60)).unwrap()).min(BLOCKS);
            let is_full = random.below(2) == 0;
            // Before it begins: from then on they may be gone, and all of them where there is no room for what says so.
            promised.blocks.retain(|(of, block)| *of != blob || !is_full && !(start..end).contains(block));
            promises.push((journal::len(&root), promised.clone()));
            let full: journal::Trouble = |path| {
                let is_new = path.extension().is_some_and(|extension| extension == "tmp");
                is_new.then_some(rustix::io::Errno::NOSPC)
            };
            journal::set_trouble(store.layout.root(), is_full.then_some(full));
            file.evict(std::slice::from_ref(&(start..end))).unwrap();
            journal::set_trouble(store.layout.root(), None);
        }
        10 => {
            let pinned = [index_of(0)].into();
            promised.blocks.retain(|(of, _)| *of == 0);
            promises.push((journal::len(&root), promised.clone()));
            store.make_room(1 + random.below(1 << 20), &pinned, &BTreeSet::new()).unwrap();
        }
        _ => {
            let small = Small::ALL[random.index(Small::ALL.len())];
            let version = u8::try_from(random.below(u64::from(Small::VERSIONS))).unwrap();
            put_small(store, small, version, promised, promises);
        }
    }
    promises.push((journal::len(&root), promised.clone()));
}

fn put_small(store: &Store, small: Small, version: u8, promised: &mut Promised, promises: &mut Vec<(usize, Promised)>) {
    let is_durable = matches!(small, Small::Pin | Small::Trace);
    // While it is put it is the old one or the new one; where nobody waits for a sync it may be none until there was one.
    match promised.small.get_mut(&small) {
        Some(versions) if is_durable => {
            versions.insert(version);
        }
        _ if small == Small::Metadata && small.get(store) == Ok(Some(version)) => {}
        _ => {
            promised.small.remove(&small);
        }
    }
    promises.push((journal::len(&store.layout.lock()), promised.clone()));
    small.put(store, version);
    if is_durable {
        promised.small.insert(small, [version].into());
    } else if small != Small::Links {
        promised.written_small.insert(small, version);
    }
}

/// A file of the modelled disk: its contents since the last sync, oldest first.
struct ModelFile {
    contents: Vec<(usize, Vec<u8>)>,
}

/// Which file a name meant, since the directory's last sync, oldest first.
type ModelName = Vec<(usize, Option<usize>)>;

/// The disk while steps are replayed. With `lies`, syncing a data file does nothing.
struct ModelDisk {
    files: Vec<ModelFile>,
    names: BTreeMap<PathBuf, ModelName>,
    lies: bool,
}

/// Forgets what is older than the last entry before the journal had `began` steps: that one is certain.
fn make_certain<T>(history: &mut Vec<(usize, T)>, began: usize) {
    let certain = history.partition_point(|(at, _)| *at < began);
    history.drain(..certain.saturating_sub(1));
}

impl ModelDisk {
    fn new(disk: &Files, lies: bool) -> Self {
        let files = disk.values().map(|bytes| ModelFile { contents: vec![(0, bytes.clone())] }).collect();
        let names = disk.keys().enumerate().map(|(file, path)| (path.clone(), vec![(0, Some(file))])).collect();
        Self { files, names, lies }
    }

    fn name(&mut self, path: &Path) -> &mut ModelName {
        self.names.entry(path.to_owned()).or_insert_with(|| vec![(0, None)])
    }

    fn file(&self, path: &Path) -> usize {
        self.names[path].last().unwrap().1.unwrap()
    }

    fn change(&mut self, at: usize, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let file = self.file(path);
        let contents = &mut self.files[file].contents;
        let mut bytes = contents.last().unwrap().1.clone();
        change(&mut bytes);
        contents.push((at, bytes));
    }

    fn step(&mut self, at: usize, path: &Path, step: &Step) {
        match step {
            Step::Create => {
                self.files.push(ModelFile { contents: vec![(at, Vec::new())] });
                let file = self.files.len() - 1;
                self.name(path).push((at, Some(file)));
            }
            Step::Write { offset_bytes, bytes } => self.change(at, path, |content| {
                let start = usize::try_from(*offset_bytes).unwrap();
                content.resize(content.len().max(start + bytes.len()), 0);
                content[start..start + bytes.len()].copy_from_slice(bytes);
            }),
            Step::SetLen(len_bytes) => {
                self.change(at, path, |content| content.resize(usize::try_from(*len_bytes).unwrap(), 0));
            }
            Step::Punch(range) => self.change(at, path, |content| {
                content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(0);
            }),
            Step::Sync { began } => {
                let is_data = path.extension().is_some_and(|extension| extension == "data");
                let file = self.file(path);
                if !(self.lies && is_data) {
                    make_certain(&mut self.files[file].contents, *began);
                }
            }
            Step::SyncDirectory { began } => {
                for (_, name) in self.names.iter_mut().filter(|(name, _)| name.parent() == Some(path)) {
                    make_certain(name, *began);
                }
            }
            Step::Rename { to } => {
                let file = self.file(path);
                self.name(to).push((at, Some(file)));
                self.name(path).push((at, None));
            }
            Step::Remove => self.name(path).push((at, None)),
        }
    }

    /// What a cut leaves of it now.
    fn cut(&self, random: &mut Random) -> Files {
        // How much of what was not synced is lost: all, nothing, any page, any sector.
        let unit_bytes = [usize::MAX, usize::MAX, BLOCK_SIZE, SECTOR_BYTES][random.index(4)];
        let mut disk = Files::new();
        for (path, name) in &self.names {
            let Some(file) = name[random.index(name.len())].1 else { continue };
            let contents = &self.files[file].contents;
            let mut bytes = contents[random.index(contents.len())].1.clone();
            let len = bytes.len();
            for start in (0..len).step_by(unit_bytes.min(len.max(1))) {
                let end = start.saturating_add(unit_bytes).min(len);
                let chosen = &contents[random.index(contents.len())].1;
                for (at, byte) in bytes[start..end].iter_mut().enumerate() {
                    *byte = chosen.get(start + at).copied().unwrap_or(0);
                }
            }
            disk.insert(path.clone(), bytes);
        }
        disk
    }
}

/// What was promised when the journal had so many steps.
fn promised_at(life: &Life, steps: usize) -> Promised {
    life.promises.iter().rev().find(|(from, _)| *from <= steps).unwrap().1.clone()
}

/// Cuts a workload after each of its steps, and what goes on after that once more. How long stores took to open after each
/// cut, and the first faults.
fn cut_everywhere(seed: u64, lies: bool) -> (Vec<Duration>, Vec<String>) {
    let mut random = Random::new(seed);
    let life = live(Files::new(), &Promised::default(), 1, &mut random).unwrap();
    let mut disk = ModelDisk::new(&life.disk, lies);
    let mut cuts = Vec::new();
    for done in 0..=life.steps.len() {
        if let Some((path, step)) = done.checked_sub(1).map(|last| &life.steps[last]) {
            disk.step(done - 1, path, step);
        }
        let again = match live(disk.cut(&mut random), &promised_at(&life, done), 2, &mut random) {
            Ok(again) => again,
            Err(faults) => return (cuts, faults),
        };
        // A second cut, somewhere in what followed the first: while the store was being opened, for one.
        let mut second = ModelDisk::new(&again.disk, lies);
        let cut_at = random.index(again.steps.len() + 1);
        for (at, (path, step)) in again.steps[..cut_at].iter().enumerate() {
            second.step(at, path, step);
        }
        match live(second.cut(&mut random), &promised_at(&again, cut_at), 3, &mut random) {
            Ok(last) => cuts.extend([again.opened_in, last.opened_in]),
            Err(faults) => return (cuts, faults),
        }
    }
    (cuts, Vec::new())
}

#[test]
fn whatever_a_power_cut_leaves_no_block_is_wrong_and_nothing_durable_is_forgotten() {
    let seeds = std::env::var("UBLKIMG_POWERCUT_SEEDS").map_or(3, |seeds| seeds.parse().unwrap());
    let mut cuts = Vec::new();
    for seed in 0..seeds {
        let (made, faults) = cut_everywhere(seed, false);
        assert_eq!(faults, Vec::<String>::new(), "seed {seed}");
        cuts.extend(made);
    }
    let longest = cuts.iter().max().copied().unwrap_or_default();
    fault_row::seen("power cut at any step of the store", "durable blocks are there, no wrong one", longest);
    let cuts = cuts.len();
    println!("{cuts} power cuts in {seeds} workloads: 0 wrong blocks, 0 durable blocks forgotten");
    assert!(cuts > 50);
}

/// The model would find a store that believes in data which was not synced.
#[test]
fn a_disk_that_only_says_that_it_syncs_is_found_out() {
    assert!((0..20).any(|seed| cut_everywhere(seed, true).1.iter().any(|fault| fault.contains("lie"))));
}
