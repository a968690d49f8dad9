//! The properties that the rest of the system relies on, against random histories.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::flight::{DEMAND_CHUNKS_TOTAL_MAX, PREFETCH_BYTES_MAX};
use crate::link::{DEMAND_CHUNKS_MAX, PREFETCH_REQUESTS_MAX};
use crate::types::{BlobKind, ChunkEntry, Class, Estimate, FillMode, ImageKey, LinkKey, Ticket};

const CHUNK_LEN_BYTES: u32 = 200 << 10;

fn key(blob: u32, chunk: u32) -> ChunkKey {
    ChunkKey { blob: BlobKey(blob), chunk }
}

const IMAGE: ImageKey = ImageKey(0);
const LINK: LinkKey = LinkKey(0);

/// A window of 4 MB.
const ESTIMATE: Estimate = Estimate { bandwidth_bytes_per_second: 100_000_000, round_trip: Now::from_millis(20) };

fn entry(chunk: u64) -> ChunkEntry {
    let stored_offset_bytes = chunk * u64::from(CHUNK_LEN_BYTES);
    ChunkEntry { stored_offset_bytes, stored_len_bytes: CHUNK_LEN_BYTES, present: false }
}

/// Between two events: as long as half a round trip.
const STEP: Now = Now::from_millis(10);

/// A scheduler with blobs of `chunks` absent chunks each, and a way to feed it one event after another.
struct Rig {
    scheduler: Scheduler,
    now: Now,
}

impl Rig {
    fn new(blobs: u32, chunks: usize) -> Self {
        let mut rig = Self { scheduler: Scheduler::new(), now: Now::ZERO };
        rig.scheduler.seed_estimate(LINK, ESTIMATE);
        for blob in 0..blobs {
            let chunks: Vec<ChunkEntry> = (0..chunks as u64).map(entry).collect();
            let (link, kind) = (LINK, BlobKind::Layer);
            assert_eq!(rig.step(Event::AddBlob { blob: BlobKey(blob), link, kind, chunks: &chunks }), []);
        }
        rig
    }

    fn step(&mut self, event: Event<'_>) -> Vec<Action> {
        let mut actions = self.step_timed(event);
        for action in &mut actions {
            if let Action::Fetch { fetch, since, .. } = action {
                (*fetch, *since) = (FetchKey(0), Now::ZERO);
            }
        }
        actions
    }

    fn step_timed(&mut self, event: Event<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        self.now += STEP;
        self.scheduler.step(event, self.now, &mut actions);
        actions
    }

    fn demand(&mut self, ticket: u64, chunks: &[ChunkKey]) -> Vec<Action> {
        self.step(Event::Demand { image: IMAGE, ticket: Ticket(ticket), chunks })
    }
}

fn fetch_at(chunk: ChunkKey, class: Class, since: Now) -> Action {
    let chunks = chunk.chunk..chunk.chunk + 1;
    Action::Fetch { fetch: FetchKey(0), blob: chunk.blob, chunks, class, since }
}

fn fetch(chunk: ChunkKey, class: Class) -> Action {
    fetch_at(chunk, class, Now::ZERO)
}

fn wake(ticket: u64, outcome: Result<(), i32>) -> Action {
    Action::Wake { ticket: Ticket(ticket), outcome }
}

#[test]
fn two_demands_for_one_chunk_are_one_fetch_and_two_wakes() {
    let mut rig = Rig::new(1, 10);
    assert_eq!(rig.demand(1, &[key(0, 3)]), [fetch(key(0, 3), Class::Demand)]);
    assert_eq!(rig.demand(2, &[key(0, 3)]), []);
    assert_eq!(rig.step(Event::Fetched { chunk: key(0, 3) }), [wake(1, Ok(())), wake(2, Ok(()))]);
    assert_eq!(rig.demand(3, &[key(0, 3)]), [wake(3, Ok(()))]);
    let counters = rig.scheduler.counters();
    assert_eq!((counters.misses, counters.joined, counters.duplicates), (1, 1, 0));
}

#[test]
fn a_failed_chunk_wakes_with_its_errno_and_is_fetched_again() {
    let mut rig = Rig::new(1, 10);
    rig.demand(1, &[key(0, 3), key(0, 5)]);
    assert_eq!(rig.step(Event::Failed { chunk: key(0, 3), errno: 28 }), [wake(1, Err(28))]);
    assert_eq!(rig.step(Event::Fetched { chunk: key(0, 5) }), []);
    rig.now += FAILURE_HOLD;
    assert_eq!(rig.demand(2, &[key(0, 3)]), [fetch(key(0, 3), Class::Demand)]);
}

#[test]
fn a_chunk_that_just_failed_is_not_asked_for_again_at_once() {
    let mut rig = Rig::new(1, 10);
    rig.demand(1, &[key(0, 3)]);
    rig.step(Event::Failed { chunk: key(0, 3), errno: 5 });
    assert_eq!(rig.demand(2, &[key(0, 3)]), [wake(2, Err(5))]);
    assert_eq!(rig.demand(3, &[key(0, 4)]), [fetch(key(0, 4), Class::Demand)], "its neighbour is");
    for chunk in 0..10 {
        rig.step(Event::Touch { image: IMAGE, chunk: key(0, chunk) });
    }
    assert!(!rig.scheduler.flights.chunks.contains_key(&key(0, 3)), "nor by read-ahead");
}

#[test]
fn what_is_found_on_this_host_counts_as_nothing_fetched() {
    let mut rig = Rig::new(1, 10);
    rig.step(Event::AddImage { image: IMAGE, link: LINK });
    let entries: Vec<_> =
        (0..6).map(|chunk| PlanEntry { chunk: key(0, chunk), due: Now::ZERO, confidence: 255 }).collect();
    let byte_cap = 3 * u64::from(CHUNK_LEN_BYTES);
    rig.step(Event::SetPlan { image: IMAGE, entries: &entries, byte_cap });
    assert!(rig.scheduler.flights.chunks.len() == 3, "as far as the cap goes");
    for chunk in 0..3 {
        rig.step(Event::Local { chunk: key(0, chunk) });
        rig.step(Event::Local { chunk: key(0, chunk) });
    }
    assert!((3..6).all(|chunk| rig.scheduler.flights.chunks.contains_key(&key(0, chunk))), "the cap is for the link");
    let (of_all, of_image) = (rig.scheduler.counters(), rig.scheduler.image_counters(IMAGE).unwrap());
    assert_eq!((of_all.local, of_all.trace, of_all.trace_bytes), (3, 3, byte_cap));
    assert_eq!((of_image.plan_bytes, of_image.prefetch_bytes), (byte_cap, byte_cap));
    assert_eq!(rig.demand(1, &[key(0, 1)]), [], "it is being copied");
    assert_eq!(rig.step(Event::Fetched { chunk: key(0, 1) }), [wake(1, Ok(()))]);
}

#[test]
fn who_joined_a_failed_read_ahead_has_a_fetch_of_its_own() {
    let mut rig = Rig::new(1, 100);
    rig.step(Event::Touch { image: IMAGE, chunk: key(0, 0) });
    rig.step(Event::Touch { image: IMAGE, chunk: key(0, 1) });
    let actions = rig.step(Event::Touch { image: IMAGE, chunk: key(0, 2) });
    assert_eq!(actions[0], fetch(key(0, 3), Class::ReadAhead));
    let joined_at = rig.now + STEP;
    assert_eq!(rig.demand(1, &[key(0, 3)])[..1], [fetch(key(0, 5), Class::ReadAhead)]);
    let mut actions = rig.step_timed(Event::Failed { chunk: key(0, 3), errno: 5 });
    if let Action::Fetch { fetch, .. } = &mut actions[0] {
        *fetch = FetchKey(0);
    }
    assert_eq!(actions, [fetch_at(key(0, 3), Class::Demand, joined_at)]);
    assert_eq!(rig.step(Event::Failed { chunk: key(0, 3), errno: 5 })[0], wake(1, Err(5)));
}

#[test]
fn a_demand_that_joins_read_ahead_is_a_late_hit_and_does_not_stop_it() {
    let mut rig = Rig::new(1, 100);
    rig.demand(1, &[key(0, 0)]);
    rig.step(Event::Fetched { chunk: key(0, 0) });
    rig.step(Event::Touch { image: IMAGE, chunk: key(0, 1) });
    rig.demand(2, &[key(0, 2)]);
    let actions = rig.step(Event::Fetched { chunk: key(0, 2) });
    let ahead = [3, 4].map(|chunk| fetch(key(0, chunk), Class::ReadAhead));
    assert_eq!(actions[0], wake(2, Ok(())));
    assert_eq!(actions[1..], ahead, "the first window, now that no demand is open");
    let actions = rig.demand(3, &[key(0, 3)]);
    assert_eq!(actions[0], fetch(key(0, 5), Class::ReadAhead), "{actions:?}");
    assert_eq!(rig.scheduler.counters().late_hits, 1);
}

#[test]
fn read_ahead_waits_while_a_demand_is_open_and_stays_inside_its_window() {
    let mut rig = Rig::new(2, 1000);
    for chunk in 0..50 {
        rig.step(Event::Touch { image: IMAGE, chunk: key(0, chunk) });
    }
    let in_flight_bytes = rig.scheduler.flights.prefetch_bytes;
    assert!((2_000_000..4_000_000).contains(&in_flight_bytes), "{in_flight_bytes}");
    assert_eq!(
        rig.demand(1, &[key(1, 500)]),
        [fetch(key(1, 500), Class::Demand)],
        "a demand never waits for the window"
    );
    let first = *rig.scheduler.flights.chunks.keys().next().unwrap();
    assert_eq!(rig.step(Event::Fetched { chunk: first }), [], "paused");
    let actions = rig.step(Event::Fetched { chunk: key(1, 500) });
    assert_eq!(actions[0], wake(1, Ok(())));
    assert!(matches!(actions[1], Action::Fetch { class: Class::ReadAhead, .. }), "goes on");
}

#[test]
fn demands_past_the_maximum_wait_in_order() {
    let mut rig = Rig::new(1, 1000);
    let chunks: Vec<ChunkKey> = (0..100).map(|chunk| key(0, chunk * 7)).collect();
    let actions = rig.demand(1, &chunks);
    assert_eq!(actions.len(), DEMAND_CHUNKS_MAX);
    let actions = rig.step(Event::Fetched { chunk: chunks[0] });
    assert_eq!(actions, [fetch(chunks[DEMAND_CHUNKS_MAX], Class::Demand)]);
}

#[test]
fn all_links_together_have_so_many_demands_on_their_way() {
    const LINKS: u32 = 7;
    let mut rig = Rig::new(0, 0);
    let chunks: Vec<ChunkEntry> = (0..100).map(entry).collect();
    let mut demand = |number: u32| {
        let blob = BlobKey(number);
        rig.step(Event::AddBlob { blob, link: LinkKey(number), kind: BlobKind::Layer, chunks: &chunks });
        let demanded: Vec<ChunkKey> = (0..50).map(|chunk| key(number, chunk * 2)).collect();
        rig.demand(number.into(), &demanded).len()
    };
    let fetches: Vec<usize> = (0..LINKS).map(&mut demand).collect();
    assert_eq!(fetches[0], DEMAND_CHUNKS_MAX);
    assert_eq!(fetches.iter().sum::<usize>(), DEMAND_CHUNKS_TOTAL_MAX);
    assert_eq!(rig.step(Event::Fetched { chunk: key(0, 0) }).len(), 1, "one ends, another begins");
}

#[test]
fn what_has_come_and_is_not_decoded_is_bounded_over_all_blobs() {
    let mut rig = Rig::new(4, 1000);
    rig.step(Event::AddImage { image: IMAGE, link: LINK });
    let blobs = [0, 1, 2, 3].map(BlobKey);
    let mut actions = rig.step(Event::SetFill { image: IMAGE, mode: FillMode::Full, blobs: &blobs });
    let mut arrived = 0;
    while let Some(action) = actions.pop() {
        let Action::Fetch { blob, chunks, .. } = action else { continue };
        for chunk in chunks {
            arrived += u64::from(CHUNK_LEN_BYTES);
            assert!(arrived <= PREFETCH_BYTES_MAX, "more has come than may wait for the decoders");
            actions.extend(rig.step(Event::Arrived { chunk: key(blob.0, chunk) }));
        }
    }
    assert!(arrived > PREFETCH_BYTES_MAX - 2 * u64::from(CHUNK_LEN_BYTES), "{arrived}");
    let goes_on = rig.step(Event::Fetched { chunk: key(0, 0) });
    assert!(matches!(goes_on[..], [Action::Fetch { class: Class::Fill, .. }]), "{goes_on:?}");
}

#[test]
fn removing_a_blob_wakes_its_waiters_and_keeps_the_place_of_its_fetches() {
    let mut rig = Rig::new(2, 200);
    let chunks: Vec<ChunkKey> = (0..70).map(|chunk| key(0, chunk * 2)).chain([key(1, 0)]).collect();
    rig.demand(1, &chunks);
    assert_eq!(rig.step(Event::RemoveBlob { blob: BlobKey(0) }), [wake(1, Err(EIO))]);
    assert_eq!(rig.scheduler.flights.demand_chunks, DEMAND_CHUNKS_MAX);
    assert_eq!(rig.demand(2, &[key(0, 0)]), [wake(2, Err(EIO))]);
    let actions = rig.step(Event::Fetched { chunk: chunks[0] });
    assert_eq!(actions, [fetch(key(1, 0), Class::Demand)], "the freed place goes to the next in the queue");
    assert_eq!(rig.scheduler.waiting(), 0);
}

#[test]
fn a_lost_chunk_is_fetched_again() {
    let mut rig = Rig::new(1, 10);
    rig.demand(1, &[key(0, 3)]);
    rig.step(Event::Fetched { chunk: key(0, 3) });
    assert!(rig.scheduler.is_present(key(0, 3)));
    rig.step(Event::Lost { chunk: key(0, 3) });
    assert_eq!(rig.demand(2, &[key(0, 3)]), [fetch(key(0, 3), Class::Demand)]);
}

/// One move of a random history. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Move {
    Demand(Vec<(u32, u32)>),
    Touch(u32, u32),
    Complete { which: usize, well: bool },
    Remove(u32),
    Lose(usize),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let chunk = || (0..3_u32, 0..130_u32);
    let one = prop_oneof![
        4 => prop::collection::vec(chunk(), 0..5).prop_map(Move::Demand),
        4 => (0..3_u32, 0..120_u32).prop_map(|(blob, chunk)| Move::Demand(vec![(blob, chunk), (blob, chunk + 1)])),
        4 => chunk().prop_map(|(blob, chunk)| Move::Touch(blob, chunk)),
        12 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(which, well)| Move::Complete { which, well }),
        1 => (0..3_u32).prop_map(Move::Remove),
        1 => any::<usize>().prop_map(Move::Lose),
    ];
    prop::collection::vec(one, 0..300)
}

/// What an honest caller sees; refuses every action that breaks a promise.
#[derive(Default)]
struct Model {
    flying: BTreeSet<ChunkKey>,
    present: BTreeSet<ChunkKey>,
    waiting: BTreeMap<Ticket, Vec<ChunkKey>>,
    removed: BTreeSet<BlobKey>,
}

impl Model {
    fn check(&mut self, actions: &[Action]) {
        for action in actions {
            match *action {
                Action::WakeAt { .. } => {}
                Action::Fetch { blob, ref chunks, .. } => {
                    let chunk = ChunkKey { blob, chunk: chunks.start };
                    assert_eq!(chunks.len(), 1);
                    assert!(!self.removed.contains(&chunk.blob), "{chunk:?} of a removed blob");
                    assert!(!self.present.contains(&chunk), "{chunk:?} is present");
                    assert!(self.flying.insert(chunk), "{chunk:?} is in flight");
                }
                Action::Wake { ticket, outcome } => {
                    let chunks = self.waiting.remove(&ticket).expect("a ticket is woken once");
                    if outcome.is_ok() {
                        assert!(chunks.iter().all(|chunk| self.present.contains(chunk)), "woken too early");
                    }
                }
            }
        }
    }

    fn bounds(&self, scheduler: &Scheduler) {
        assert_eq!(scheduler.flights.chunks.len(), self.flying.len());
        assert_eq!(scheduler.waiting(), self.waiting.len());
        let link = scheduler.links.get(&LINK).unwrap();
        assert!(link.demands <= DEMAND_CHUNKS_MAX);
        assert!(link.prefetches <= PREFETCH_REQUESTS_MAX);
        let queued: BTreeSet<ChunkKey> = link.queue.iter().map(|queued| queued.chunk).collect();
        assert_eq!(queued.len(), link.queue.len());
        let waited: Vec<&ChunkKey> = scheduler.demands.waiters.keys().collect();
        assert!(waited.into_iter().all(|chunk| self.flying.contains(chunk) || queued.contains(chunk)));
        assert_eq!(scheduler.counters().duplicates, 0);
    }
}

fn nth<T: Copy>(set: &BTreeSet<T>, which: usize) -> Option<T> {
    set.iter().nth(which.checked_rem(set.len())?).copied()
}

proptest! {
    #[test]
    fn promises_hold_in_every_history(moves in moves()) {
        let mut rig = Rig::new(3, 128);
        let mut model = Model::default();
        for (number, one) in moves.into_iter().enumerate() {
            let ticket = Ticket(number as u64);
            let actions = match one {
                Move::Demand(chunks) => {
                    let chunks: Vec<ChunkKey> = chunks.into_iter().map(|(blob, chunk)| key(blob, chunk)).collect();
                    model.waiting.insert(ticket, chunks.clone());
                    rig.step(Event::Demand { image: IMAGE, ticket, chunks: &chunks })
                }
                Move::Touch(blob, chunk) => rig.step(Event::Touch { image: IMAGE, chunk: key(blob, chunk) }),
                Move::Complete { which, well } => {
                    let Some(chunk) = nth(&model.flying, which) else { continue };
                    model.flying.remove(&chunk);
                    if well {
                        model.present.insert(chunk);
                        rig.step(Event::Fetched { chunk })
                    } else {
                        rig.step(Event::Failed { chunk, errno: 5 })
                    }
                }
                Move::Remove(blob) => {
                    model.removed.insert(BlobKey(blob));
                    rig.step(Event::RemoveBlob { blob: BlobKey(blob) })
                }
                Move::Lose(which) => {
                    let Some(chunk) = nth(&model.present, which) else { continue };
                    // A request that waits for others besides is woken all the same, and plans again.
                    if model.waiting.values().flatten().any(|waited| *waited == chunk) {
                        continue;
                    }
                    model.present.remove(&chunk);
                    rig.step(Event::Lost { chunk })
                }
            };
            model.check(&actions);
            model.bounds(&rig.scheduler);
        }
        // Everything in flight lands: nobody is left waiting.
        while let Some(chunk) = nth(&model.flying, 0) {
            model.flying.remove(&chunk);
            model.present.insert(chunk);
            let actions = rig.step(Event::Fetched { chunk });
            model.check(&actions);
        }
        prop_assert!(model.waiting.is_empty(), "left waiting: {:?}", model.waiting);
        prop_assert!(rig.scheduler.demands.waiters.is_empty());
    }
}
