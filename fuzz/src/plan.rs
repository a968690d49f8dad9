//! A hostile profile in the scheduler: whatever a trace and a hot table say, their plan costs at most its byte cap, nothing
//! is fetched twice, and no device request waits for ever.
//!
//! The input is a trace, a hot table and a script of what happens meanwhile.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ublkimg_image::{HotTable, Trace};
use ublkimg_scheduler::{
    Action, BlobKey, BlobKind, ChunkEntry, ChunkKey, Class, Event, FetchKey, FillMode, ImageKey, LinkKey, PlanEntry,
    Scheduler, Ticket,
};

use crate::sample;

const IMAGE: ImageKey = ImageKey(1);
const LINK: LinkKey = LinkKey(1);
const HOT: BlobKey = BlobKey(1_000_000);

/// Chunks of each layer blob, and most frames of the hot blob: enough for ranges and windows, few enough to be fast.
const CHUNKS: u32 = 32;
const FRAMES: usize = 64;
const CHUNK_BLOCKS: u32 = ublkimg_image::CHUNK_BLOCKS;

/// Most steps of a plan and of a script.
const ENTRIES_MAX: usize = 4096;

pub(crate) fn plan(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<8>() else {
        return;
    };
    let [t0, t1, h0, h1, cap @ ..] = *head;
    let byte_cap = u64::from(u32::from_le_bytes(cap));
    let Some((trace, rest)) = rest.split_at_checked(usize::from(u16::from_le_bytes([t0, t1]))) else {
        return;
    };
    let Some((table, script)) = rest.split_at_checked(usize::from(u16::from_le_bytes([h0, h1]))) else {
        return;
    };
    let Ok(trace) = Trace::decode(trace) else {
        return;
    };
    let mut table = HotTable::decode(table).unwrap_or_default();
    table.frames.truncate(FRAMES);
    Run::new(&trace, &table, byte_cap).play(script);
}

/// A scheduler and what must hold of it.
struct Run {
    scheduler: Scheduler,
    now: Duration,
    tick_at: Option<Duration>,
    actions: Vec<Action>,
    stored: BTreeMap<ChunkKey, (u64, u64)>,
    planned: Vec<ChunkKey>,
    byte_cap: u64,
    plan_bytes: u64,
    /// Requests under way: what of them is still to come.
    flights: VecDeque<(FetchKey, VecDeque<ChunkKey>, bool)>,
    /// Chunks that are here and not in the store yet.
    arrived: VecDeque<ChunkKey>,
    in_flight: BTreeSet<ChunkKey>,
    present: BTreeSet<ChunkKey>,
    withdrawn: BTreeSet<ChunkKey>,
    waiting: BTreeSet<Ticket>,
    tickets: u64,
}

impl Run {
    fn new(trace: &Trace, table: &HotTable, byte_cap: u64) -> Self {
        let mut run = Self {
            scheduler: Scheduler::new(),
            now: Duration::ZERO,
            tick_at: None,
            actions: Vec::new(),
            stored: BTreeMap::new(),
            planned: planned(trace, table),
            byte_cap,
            plan_bytes: 0,
            flights: VecDeque::new(),
            arrived: VecDeque::new(),
            in_flight: BTreeSet::new(),
            present: BTreeSet::new(),
            withdrawn: BTreeSet::new(),
            waiting: BTreeSet::new(),
            tickets: 0,
        };
        run.step(Event::AddImage { image: IMAGE, link: LINK });
        let layers = trace.header.blobs.len().min(8);
        for blob in (0..).map(BlobKey).take(layers) {
            let lens = (0..CHUNKS).map(|chunk| (1000 + 37 * (chunk + blob.0), chunk % 11 == 3));
            run.add_blob(blob, BlobKind::Layer, lens);
        }
        run.add_blob(HOT, BlobKind::Hot, table.frames.iter().map(|frame| (frame.stored_len_bytes, false)));
        let entries: Vec<PlanEntry> = (0..)
            .zip(&run.planned)
            .map(|(number, chunk)| PlanEntry { chunk: *chunk, due: Duration::from_millis(number), confidence: 255 })
            .collect();
        run.step(Event::SetPlan { image: IMAGE, entries: &entries, byte_cap });
        run
    }

    fn add_blob(&mut self, blob: BlobKey, kind: BlobKind, lens: impl Iterator<Item = (u32, bool)>) {
        let mut offset = 24;
        let mut chunks = Vec::new();
        for ((stored_len_bytes, present), chunk) in lens.zip(0..) {
            chunks.push(ChunkEntry { stored_offset_bytes: offset, stored_len_bytes, present });
            let key = ChunkKey { blob, chunk };
            self.stored.insert(key, (offset, u64::from(stored_len_bytes)));
            if present {
                self.present.insert(key);
            }
            offset += u64::from(stored_len_bytes);
        }
        self.step(Event::AddBlob { blob, link: LINK, kind, chunks: &chunks });
    }

    fn play(mut self, script: &[u8]) {
        let mut bytes = script.iter().copied().take(ENTRIES_MAX);
        while let Some(byte) = bytes.next() {
            let which = usize::from(byte >> 3);
            match byte & 7 {
                0 => self.receive(which),
                1 => self.store(|chunk| Event::Fetched { chunk }),
                2 => self.store(|chunk| Event::Failed { chunk, errno: 5 }),
                3 => self.store(|chunk| match chunk.blob {
                    HOT => Event::Withdrawn { chunk },
                    _ => Event::Fetched { chunk },
                }),
                4 => {
                    let chunk = u32::from(bytes.next().unwrap_or(0)) % CHUNKS;
                    self.demand(ChunkKey { blob: BlobKey(u32::from(byte >> 3)), chunk });
                }
                5 => {
                    let place = which * 256 + usize::from(bytes.next().unwrap_or(0));
                    if let Some(chunk) = self.planned.get(place).copied() {
                        self.demand(chunk);
                    }
                }
                6 => {
                    let touched = self.present.iter().nth(which).copied();
                    touched.into_iter().for_each(|chunk| self.step(Event::Touch { image: IMAGE, chunk }));
                }
                _ => self.pass(Duration::from_micros(1 << which.min(20))),
            }
        }
        self.end();
    }

    /// Everything comes, and nobody is left waiting.
    fn end(mut self) {
        self.step(Event::SetFill { image: IMAGE, mode: FillMode::Off, blobs: &[] });
        let mut idle = 0;
        while idle < 64 {
            match (self.flights.is_empty(), self.arrived.is_empty()) {
                (false, _) => self.receive(0),
                (_, false) => self.store(|chunk| Event::Fetched { chunk }),
                _ => {
                    idle += 1;
                    let step = self.tick_at.map_or(Duration::from_secs(1), |at| at.saturating_sub(self.now));
                    self.pass(step.clamp(Duration::from_micros(1), Duration::from_secs(60)));
                }
            }
        }
        assert!(self.waiting.is_empty(), "{} device requests wait for ever", self.waiting.len());
        self.step(Event::RemoveImage { image: IMAGE });
    }

    /// The next chunk of one of the requests under way comes.
    fn receive(&mut self, which: usize) {
        let Some(place) = which.checked_rem(self.flights.len()) else {
            return;
        };
        let (fetch, chunks, begun) = &mut self.flights[place];
        let (fetch, chunk) = (*fetch, chunks.pop_front());
        let first = !std::mem::replace(begun, true);
        if chunks.is_empty() {
            self.flights.remove(place);
        }
        self.now += Duration::from_micros(100);
        if first {
            self.step(Event::FirstByte { fetch });
        }
        if let Some(chunk) = chunk {
            self.arrived.push_back(chunk);
            self.step(Event::Arrived { chunk });
        }
    }

    /// What has come longest ago is decoded and stored, or is not.
    fn store(&mut self, event: impl Fn(ChunkKey) -> Event<'static>) {
        let Some(chunk) = self.arrived.pop_front() else {
            return;
        };
        self.in_flight.remove(&chunk);
        let event = event(chunk);
        match event {
            Event::Fetched { .. } => drop(self.present.insert(chunk)),
            Event::Withdrawn { .. } => drop(self.withdrawn.insert(chunk)),
            _ => {}
        }
        self.step(event);
    }

    /// As a driver does: it asks for what is not there, and for no frame that was withdrawn.
    fn demand(&mut self, chunk: ChunkKey) {
        let known = self.stored.contains_key(&chunk);
        if !known || self.present.contains(&chunk) || self.withdrawn.contains(&chunk) {
            return;
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.waiting.insert(ticket);
        self.step(Event::Demand { image: IMAGE, ticket, chunks: &[chunk] });
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        if self.tick_at.is_some_and(|at| at <= self.now) {
            self.tick_at = None;
        }
        self.step(Event::Tick);
    }

    fn step(&mut self, event: Event<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.step(event, self.now, &mut actions);
        for action in actions.drain(..) {
            match action {
                Action::Fetch { fetch, blob, chunks, class, .. } => {
                    let chunks: Vec<_> = chunks.map(|chunk| ChunkKey { blob, chunk }).collect();
                    self.begin(fetch, &chunks, class);
                }
                Action::Wake { ticket, .. } => assert!(self.waiting.remove(&ticket), "woken twice"),
                Action::WakeAt { at } => self.tick_at = Some(at),
            }
        }
        self.actions = actions;
    }

    fn begin(&mut self, fetch: FetchKey, chunks: &[ChunkKey], class: Class) {
        assert!(!chunks.is_empty() && (class != Class::Demand || chunks.len() == 1));
        let mut end = None;
        for chunk in chunks {
            let (offset, len) = self.stored[chunk];
            assert!(end.is_none_or(|end| end == offset), "a range with a gap");
            assert!(!self.present.contains(chunk) && self.in_flight.insert(*chunk), "fetched twice: {chunk:?}");
            assert!(!self.withdrawn.contains(chunk), "a withdrawn frame is fetched again");
            end = Some(offset + len);
            if class == Class::Trace {
                self.plan_bytes += len;
            }
        }
        assert!(self.plan_bytes <= self.byte_cap, "{} bytes by a plan of {}", self.plan_bytes, self.byte_cap);
        self.flights.push_back((fetch, chunks.iter().copied().collect(), false));
    }
}

/// The chunks of a plan, as a driver makes it: frames for the first ranks, chunks of layers for the others. Some of a hostile
/// trace do not exist.
fn planned(trace: &Trace, table: &HotTable) -> Vec<ChunkKey> {
    let layout = table.layout();
    let mut planned: Vec<ChunkKey> = (0..)
        .zip(trace.traced_blocks())
        .take(16 * ENTRIES_MAX)
        .map(|(rank, block)| match layout.frame_of(rank) {
            Some(frame) => ChunkKey { blob: HOT, chunk: frame },
            None => ChunkKey { blob: BlobKey(u32::from(block.blob)), chunk: block.block / CHUNK_BLOCKS },
        })
        .collect();
    planned.dedup();
    planned.truncate(ENTRIES_MAX);
    planned
}

pub(crate) fn plan_seeds() -> Vec<Vec<u8>> {
    let seed = |trace: &Trace, table: &HotTable, cap: u32, script: &[u8]| {
        let (trace, table) = (trace.encode().expect("good"), table.encode().expect("good"));
        let len = |bytes: &[u8]| u16::try_from(bytes.len()).expect("short").to_le_bytes();
        [&len(&trace)[..], &len(&table), &cap.to_le_bytes(), &trace, &table, script].concat()
    };
    let none = HotTable::default();
    let table = sample::hot_table(5);
    let calm: Vec<u8> = [0, 1, 0x57, 6].repeat(60);
    let busy: Vec<u8> = [4, 9, 0, 5, 1, 0x2f, 2, 0, 12, 20, 1, 3].repeat(30);
    vec![
        seed(&sample::trace(40), &none, 1 << 20, &calm),
        seed(&sample::trace(200), &none, u32::MAX, &busy),
        seed(&sample::trace(100), &table, u32::MAX, &calm),
        seed(&sample::trace(100), &table, 2000, &busy),
    ]
}
