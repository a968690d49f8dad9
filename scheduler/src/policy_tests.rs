//! What plans, fills, windows and caps promise, against random histories of an honest caller.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::fair::QUANTUM_BYTES;
use crate::types::{
    Action, BlobKey, BlobKind, ChunkEntry, ChunkKey, Class, Event, FetchKey, FillMode, ImageKey, LinkKey, Now,
    PlanEntry, Ticket,
};
use crate::{PREFETCH_REQUESTS_MAX, Scheduler};

const LINK: LinkKey = LinkKey(0);
const IMAGES: [ImageKey; 2] = [ImageKey(0), ImageKey(1)];
const CHUNKS: u32 = 120;
const CAP_BYTES: u64 = 8 << 20;

fn key(blob: u32, chunk: u32) -> ChunkKey {
    ChunkKey { blob: BlobKey(blob), chunk }
}

fn len_bytes(chunk: u32) -> u32 {
    20_000 + chunk * 7919 % 220_000
}

fn entries() -> Vec<ChunkEntry> {
    let mut stored_offset_bytes = 0;
    let entry = |chunk| {
        // Here and there something lies between two chunks.
        stored_offset_bytes += u64::from(chunk % 9 == 0);
        let entry = ChunkEntry { stored_offset_bytes, stored_len_bytes: len_bytes(chunk), present: chunk % 31 == 30 };
        stored_offset_bytes += u64::from(entry.stored_len_bytes);
        entry
    };
    (0..CHUNKS).map(entry).collect()
}

fn plan(chunks: impl Iterator<Item = ChunkKey>) -> Vec<PlanEntry> {
    chunks.map(|chunk| PlanEntry { chunk, due: Now::ZERO, confidence: 255 }).collect()
}

/// A request as the caller sees it.
#[derive(Debug)]
struct Request {
    class: Class,
    left: BTreeSet<ChunkKey>,
}

/// The caller: keeps its own books, and refuses whatever breaks a promise.
struct World {
    scheduler: Scheduler,
    now: Now,
    requests: BTreeMap<FetchKey, Request>,
    /// Chunks that have arrived and not ended.
    arrived: BTreeSet<ChunkKey>,
    present: BTreeSet<ChunkKey>,
    waiting: BTreeSet<Ticket>,
    /// Bytes of prefetch that open demands found or met, and the largest window meanwhile.
    company: Option<(u64, u64)>,
    log: Vec<Action>,
}

impl World {
    /// Two layers, a hot blob (2), and two images.
    fn new() -> Self {
        let mut world = Self {
            scheduler: Scheduler::new(),
            now: Now::from_secs(1),
            requests: BTreeMap::new(),
            arrived: BTreeSet::new(),
            present: BTreeSet::new(),
            waiting: BTreeSet::new(),
            company: None,
            log: Vec::new(),
        };
        for image in IMAGES {
            world.step(Event::AddImage { image, link: LINK });
        }
        for (blob, kind) in [(0, BlobKind::Layer), (1, BlobKind::Layer), (2, BlobKind::Hot)] {
            world.step(Event::AddBlob { blob: BlobKey(blob), link: LINK, kind, chunks: &entries() });
            let present = (0..CHUNKS).filter(|chunk| chunk % 31 == 30);
            world.present.extend(present.map(|chunk| key(blob, chunk)));
        }
        world
    }

    fn step(&mut self, event: Event<'_>) {
        let mut actions = Vec::new();
        self.now += Now::from_micros(700);
        if !self.requests.values().any(|request| request.class == Class::Demand) {
            self.company = None;
        }
        let window = self.window_bytes();
        self.scheduler.step(event, self.now, &mut actions);
        // An arrival changes the window before anything is issued.
        let window = window.max(self.window_bytes());
        for action in &actions {
            self.check(action, window);
        }
        self.log.extend(actions);
        for image in IMAGES {
            let counters = self.scheduler.image_counters(image).unwrap_or_default();
            assert!(counters.plan_bytes <= 2 * CAP_BYTES, "two plans at most: {counters:?}");
        }
        assert_eq!(self.scheduler.counters().duplicates, 0);
        assert_eq!(self.scheduler.waiting(), self.waiting.len());
    }

    fn window_bytes(&self) -> u64 {
        self.scheduler.window_bytes(LINK).unwrap_or_default()
    }

    fn prefetch(&self) -> impl Iterator<Item = &Request> {
        self.requests.values().filter(|request| request.class != Class::Demand)
    }

    fn prefetch_bytes(&self) -> u64 {
        self.prefetch().flat_map(|request| &request.left).map(|chunk| u64::from(len_bytes(chunk.chunk))).sum()
    }

    fn check(&mut self, action: &Action, window: u64) {
        match action {
            Action::Wake { ticket, .. } => assert!(self.waiting.remove(ticket), "{ticket:?} is woken twice"),
            Action::WakeAt { at } => assert!(*at > self.now),
            Action::Fetch { fetch, blob, chunks, class, .. } => {
                let left: BTreeSet<ChunkKey> = chunks.clone().map(|chunk| ChunkKey { blob: *blob, chunk }).collect();
                let flying = |chunk| self.requests.values().any(|request| request.left.contains(chunk));
                for chunk in &left {
                    assert!(!flying(chunk) && !self.arrived.contains(chunk) && !self.present.contains(chunk));
                    assert!(chunk.chunk == chunks.start || chunk.chunk % 9 != 0, "{chunks:?} is no range");
                }
                let bytes: u64 = left.iter().map(|chunk| u64::from(len_bytes(chunk.chunk))).sum();
                self.requests.insert(*fetch, Request { class: *class, left });
                if *class == Class::Demand {
                    assert_eq!(chunks.len(), 1);
                    let found = self.prefetch_bytes();
                    let (met, most) = self.company.unwrap_or_default();
                    self.company = Some((met.max(found), most.max(window)));
                } else {
                    assert!(self.prefetch_bytes() <= window, "more than a window in flight");
                    assert!(self.prefetch().count() <= PREFETCH_REQUESTS_MAX);
                    if let Some((met, most)) = &mut self.company {
                        assert_eq!(*class, Class::Trace, "only a plan goes on beside a demand");
                        *met += bytes;
                        *most = (*most).max(window);
                        assert!(met <= most, "a demand meets more than a window");
                    }
                }
            }
        }
    }

    fn demand(&mut self, image: ImageKey, ticket: u64, chunk: ChunkKey) {
        self.waiting.insert(Ticket(ticket));
        self.step(Event::Demand { image, ticket: Ticket(ticket), chunks: &[chunk] });
    }

    fn arrive(&mut self, which: usize) {
        if let Some(chunk) = self.leave(which) {
            self.step(Event::Arrived { chunk });
        }
    }

    /// A chunk that was to be fetched turns out to be here.
    fn find(&mut self, which: usize) {
        if let Some(chunk) = self.leave(which) {
            let estimate = self.scheduler.estimate(LINK);
            self.step(Event::Local { chunk });
            assert_eq!(self.scheduler.estimate(LINK), estimate, "it says nothing of the link");
        }
    }

    /// Takes a chunk off its request.
    fn leave(&mut self, which: usize) -> Option<ChunkKey> {
        let flying = self.requests.values().filter_map(|request| request.left.first().copied());
        let flying: Vec<ChunkKey> = flying.collect();
        let chunk = *flying.get(which.checked_rem(flying.len())?)?;
        self.requests.retain(|_, request| {
            request.left.remove(&chunk);
            !request.left.is_empty()
        });
        self.arrived.insert(chunk);
        Some(chunk)
    }

    fn end(&mut self, which: usize, well: bool) {
        let Some(which) = which.checked_rem(self.arrived.len()) else { return };
        let Some(chunk) = self.arrived.iter().nth(which).copied() else { return };
        self.arrived.remove(&chunk);
        if well {
            self.present.insert(chunk);
            self.step(Event::Fetched { chunk });
        } else if chunk.blob == BlobKey(2) {
            self.step(Event::Withdrawn { chunk });
        } else {
            self.step(Event::Failed { chunk, errno: 5 });
        }
    }

    /// Lets everything arrive, and time pass, until nothing more is asked for.
    fn drain(&mut self) {
        for _ in 0..20 {
            while !self.requests.is_empty() || !self.arrived.is_empty() {
                self.arrive(0);
                self.end(0, true);
            }
            self.now += Now::from_secs(10);
            self.step(Event::Tick);
        }
    }
}

#[derive(Debug, Clone)]
enum Move {
    Plan(usize, Vec<(u32, u32)>),
    Fill(usize, u8),
    Demand(usize, u32, u32),
    Touch(usize, u32, u32),
    Arrive(usize),
    Find(usize),
    End(usize, bool),
    Wait(u64),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let image = || 0..2_usize;
    let one = prop_oneof![
        3 => (image(), 0..3_u32, 0..CHUNKS).prop_map(|(image, blob, chunk)| Move::Demand(image, blob, chunk)),
        2 => (image(), 0..3_u32, 0..CHUNKS).prop_map(|(image, blob, chunk)| Move::Touch(image, blob, chunk)),
        8 => any::<usize>().prop_map(Move::Arrive),
        2 => any::<usize>().prop_map(Move::Find),
        8 => (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(which, well)| Move::End(which, well)),
        1 => (0..2_000_u64).prop_map(Move::Wait),
        1 => (image(), 0..3_u8).prop_map(|(image, mode)| Move::Fill(image, mode)),
    ];
    let plans = prop::collection::vec((0..3_u32, 0..CHUNKS), 0..200);
    let plan = (image(), plans).prop_map(|(image, chunks)| Move::Plan(image, chunks));
    (plan, prop::collection::vec(one, 0..400)).prop_map(|(plan, mut moves)| {
        moves.insert(0, plan);
        moves
    })
}

fn play(moves: &[Move]) -> World {
    let mut world = World::new();
    for (number, one) in moves.iter().enumerate() {
        match one {
            Move::Plan(image, chunks) => {
                let entries = plan(chunks.iter().map(|(blob, chunk)| key(*blob, *chunk)));
                world.step(Event::SetPlan { image: IMAGES[*image], entries: &entries, byte_cap: CAP_BYTES });
            }
            Move::Fill(image, mode) => {
                let mode = [FillMode::Off, FillMode::Idle, FillMode::Full][usize::from(*mode)];
                let blobs = [BlobKey(0), BlobKey(1)];
                world.step(Event::SetFill { image: IMAGES[*image], mode, blobs: &blobs });
            }
            Move::Demand(image, blob, chunk) => world.demand(IMAGES[*image], number as u64, key(*blob, *chunk)),
            Move::Touch(image, blob, chunk) => {
                world.step(Event::Touch { image: IMAGES[*image], chunk: key(*blob, *chunk) });
            }
            Move::Arrive(which) => world.arrive(*which),
            Move::Find(which) => world.find(*which),
            Move::End(which, well) => world.end(*which, *well),
            Move::Wait(wait_ms) => {
                world.now += Now::from_millis(*wait_ms);
                world.step(Event::Tick);
            }
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_duplicate_no_window_and_no_cap_exceeded_and_nobody_left_waiting(moves in moves()) {
        let mut world = play(&moves);
        world.drain();
        prop_assert!(world.waiting.is_empty(), "left waiting: {:?}", world.waiting);
    }

    #[test]
    fn the_same_events_give_the_same_actions(moves in moves()) {
        prop_assert_eq!(play(&moves).log, play(&moves).log);
    }

    #[test]
    fn a_plan_that_is_read_in_its_order_is_fetched_whole(seed in any::<u32>(), count in 1..100_u32) {
        let mut world = World::new();
        let mut chunks: Vec<ChunkKey> = (0..count).map(|chunk| key(chunk % 3, chunk)).collect();
        chunks.sort_by_key(|chunk| (chunk.chunk ^ seed).wrapping_mul(2_654_435_761));
        let entries = plan(chunks.iter().copied());
        world.step(Event::SetPlan { image: IMAGES[0], entries: &entries, byte_cap: u64::MAX / 4 });
        for &chunk in &chunks {
            world.arrive(0);
            world.end(0, true);
            world.step(Event::Touch { image: IMAGES[0], chunk });
        }
        world.drain();
        prop_assert!(chunks.iter().all(|chunk| world.present.contains(chunk)));
        let counters = world.scheduler.image_counters(IMAGES[0]).unwrap_or_default();
        prop_assert_eq!(counters.misses, 0);
    }

    #[test]
    fn a_fill_of_either_mode_brings_every_layer_whatever_else_is_read(
        is_idle in any::<bool>(),
        ends in prop::collection::vec((any::<usize>(), prop::bool::weighted(0.9)), 0..300),
        demands in prop::collection::vec((0..2_u32, 0..CHUNKS), 0..40),
    ) {
        let mut world = World::new();
        let mode = if is_idle { FillMode::Idle } else { FillMode::Full };
        world.step(Event::SetFill { image: IMAGES[0], mode, blobs: &[BlobKey(0), BlobKey(1)] });
        let mut demands = (0..).zip(demands);
        for (which, well) in ends {
            let fills = |world: &World| world.requests.values().filter(|request| request.class == Class::Fill).count();
            if is_idle {
                prop_assert!(fills(&world) <= 1, "an idle fill has one request in flight");
            }
            if which % 7 == 0 && let Some((ticket, (blob, chunk))) = demands.next() {
                world.demand(IMAGES[1], ticket, key(blob, chunk));
                let before = fills(&world);
                world.step(Event::Tick);
                prop_assert_eq!(fills(&world), before, "nothing of a fill begins beside a demand");
            }
            world.arrive(which);
            world.end(which, well);
        }
        // An idle fill asks for one range at a time.
        for _ in 0..u64::from(CHUNKS) {
            world.drain();
        }
        let progress = world.scheduler.fill_progress(IMAGES[0]).unwrap();
        prop_assert!(progress.finished, "{:?}", progress);
        prop_assert_eq!(progress.present_bytes, progress.total_bytes, "what failed was asked for again");
    }

    #[test]
    fn images_share_a_link_by_bytes_in_whatever_order_they_read(
        seeds in (any::<u32>(), any::<u32>()),
        arrivals in prop::collection::vec(any::<usize>(), 0..150),
        are_fills in any::<bool>(),
    ) {
        let mut world = World::new();
        for (image, seed) in [(0, seeds.0), (1, seeds.1)] {
            let blob = u32::try_from(image).unwrap();
            if are_fills {
                let blobs = [BlobKey(blob)];
                world.step(Event::SetFill { image: IMAGES[image], mode: FillMode::Full, blobs: &blobs });
                continue;
            }
            let mut chunks: Vec<ChunkKey> = (0..CHUNKS).map(|chunk| key(blob, chunk)).collect();
            chunks.sort_by_key(|chunk| (chunk.chunk ^ seed).wrapping_mul(2_654_435_761));
            let entries = plan(chunks.into_iter());
            world.step(Event::SetPlan { image: IMAGES[image], entries: &entries, byte_cap: u64::MAX / 4 });
        }
        let issued = |world: &World| IMAGES.map(|image| {
            world.scheduler.image_counters(image).map_or(0, |counters| counters.prefetch_bytes)
        });
        let all: u64 = (0..CHUNKS).filter(|chunk| chunk % 31 != 30).map(|chunk| u64::from(len_bytes(chunk))).sum();
        // The first had the link for itself until the second came.
        let lead = issued(&world)[0];
        for which in arrivals {
            world.arrive(which);
            world.end(which, true);
            let [first, second] = issued(&world);
            if first == all || second == all {
                break;
            }
            let apart = first.saturating_sub(lead).abs_diff(second);
            prop_assert!(apart <= lead + 2 * QUANTUM_BYTES, "{first} and {second} after a lead of {lead}");
        }
    }
}

#[test]
fn a_full_fill_fetches_every_layer_and_says_so() {
    let mut world = World::new();
    let blobs = [BlobKey(0), BlobKey(1)];
    world.step(Event::SetFill { image: IMAGES[0], mode: FillMode::Full, blobs: &blobs });
    assert!(!world.scheduler.fill_progress(IMAGES[0]).unwrap().finished);
    world.drain();
    let progress = world.scheduler.fill_progress(IMAGES[0]).unwrap();
    assert_eq!(progress.present_bytes, progress.total_bytes);
    assert!(progress.finished);
    assert!(!world.scheduler.is_present(key(2, 0)), "no frame of a hot blob");
}

#[test]
fn an_idle_fill_waits_for_silence_and_goes_on_one_request_at_a_time() {
    let mut world = World::new();
    world.step(Event::SetFill { image: IMAGES[0], mode: FillMode::Idle, blobs: &[BlobKey(0)] });
    assert_eq!(world.requests.len(), 1, "nobody ever demanded anything");
    world.demand(IMAGES[0], 1, key(1, 3));
    while !world.requests.is_empty() {
        world.arrive(0);
        world.end(0, true);
    }
    assert!(world.log.iter().any(|action| matches!(action, Action::WakeAt { .. })));
    world.now += crate::fill::QUIET;
    world.step(Event::Tick);
    assert_eq!(world.requests.len(), 1);
}

#[test]
fn images_with_plans_share_a_link() {
    let mut world = World::new();
    for (image, blob) in [(0, 0), (1, 1)] {
        let entries = plan((0..CHUNKS).map(|chunk| key(blob, chunk)));
        world.step(Event::SetPlan { image: IMAGES[image], entries: &entries, byte_cap: u64::MAX / 4 });
    }
    for _ in 0..100 {
        world.arrive(0);
        world.end(0, true);
    }
    let spent = IMAGES.map(|image| world.scheduler.image_counters(image).unwrap().plan_bytes);
    assert!(spent[0].abs_diff(spent[1]) < 2 << 20, "{spent:?}");
}

#[test]
fn a_plan_of_strangers_costs_a_window_for_few_misses_only() {
    let mut world = World::new();
    let entries = plan((0..CHUNKS).map(|chunk| key(0, chunk)));
    world.step(Event::SetPlan { image: IMAGES[0], entries: &entries, byte_cap: u64::MAX / 4 });
    for miss in 0..40_u32 {
        world.demand(IMAGES[0], u64::from(miss), key(1, miss * 7 % CHUNKS));
        while !world.requests.is_empty() {
            world.arrive(0);
            world.end(0, true);
        }
        world.now += Now::from_secs(1);
        world.step(Event::Tick);
    }
    let spent = world.scheduler.image_counters(IMAGES[0]).unwrap().plan_bytes;
    assert!(spent <= 3 << 20, "{spent} bytes for a wholly wrong plan");
    assert!(!world.scheduler.trusts_plan(IMAGES[0]));
}

#[test]
fn a_withdrawn_frame_wakes_who_waits_and_is_never_asked_for_again() {
    let mut world = World::new();
    world.demand(IMAGES[0], 1, key(2, 4));
    world.arrive(0);
    world.end(0, false);
    assert!(world.waiting.is_empty());
    assert!(matches!(world.log.last(), Some(Action::Wake { outcome: Ok(()), .. })));
    world.demand(IMAGES[0], 2, key(2, 4));
    assert!(world.requests.is_empty() && world.waiting.is_empty());
}

#[test]
fn a_step_costs_little_with_a_hundred_thousand_chunks() {
    let count = 100_000_u32;
    let entry = |chunk: u32| ChunkEntry {
        stored_offset_bytes: u64::from(chunk) * 70_000,
        stored_len_bytes: 65_000,
        present: false,
    };
    let chunks: Vec<ChunkEntry> = (0..count).map(entry).collect();
    let mut scheduler = Scheduler::new();
    let mut actions = Vec::new();
    let mut now = Now::ZERO;
    let mut step = |event: Event<'_>, actions: &mut Vec<Action>| {
        now += Now::from_micros(500);
        scheduler.step(event, now, actions);
    };
    step(Event::AddImage { image: IMAGES[0], link: LINK }, &mut actions);
    let (blob, kind) = (BlobKey(0), BlobKind::Layer);
    step(Event::AddBlob { blob, link: LINK, kind, chunks: &chunks }, &mut actions);
    let entries = plan((0..count).map(|chunk| key(0, chunk.wrapping_mul(7919) % count)));
    step(Event::SetPlan { image: IMAGES[0], entries: &entries, byte_cap: u64::MAX }, &mut actions);
    // Of the order of count times a logarithm; were a step linear, this would take hours.
    let mut done = 0;
    while let Some(action) = actions.get(done).cloned() {
        done += 1;
        if let Action::Fetch { blob, chunks, .. } = action {
            for chunk in chunks.map(|chunk| ChunkKey { blob, chunk }) {
                step(Event::Arrived { chunk }, &mut actions);
                step(Event::Fetched { chunk }, &mut actions);
                step(Event::Touch { image: IMAGES[0], chunk }, &mut actions);
            }
        }
    }
    assert!((0..count).all(|chunk| scheduler.is_present(key(0, chunk))));
}
