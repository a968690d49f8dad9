//! The simulator against arithmetic, and the policies against the bound.

use std::time::Duration;

use proptest::prelude::*;

use crate::types::ChunkKey;

use super::*;

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn link(mbit_per_s: f64, round_trip_ms: u64) -> Link {
    Link { bandwidth_bytes_per_s: mbit_per_s * 125_000.0, round_trip: ms(round_trip_ms) }
}

/// Four chunks of 100, 50, 25 and 12.5 kB.
fn small_image() -> SimulatedImage {
    let size = |chunk: u32| ChunkSize { chunk, raw_len_bytes: 262_144, stored_len_bytes: 100_000 >> chunk };
    SimulatedImage::new(1 << 20, &[0, 1, 2, 3].map(size))
}

fn reads(reads: &[(i64, u32, u32)]) -> Vec<RecordedRead> {
    reads.iter().map(|&(at_ms, block, blocks)| RecordedRead { at_us: at_ms * 1000, block, blocks }).collect()
}

fn layer(chunk: u32) -> ChunkKey {
    ChunkKey { blob: LAYER, chunk }
}

fn run(image: &SimulatedImage, program: &Program, link: Link, policy: &mut dyn Policy) -> Outcome {
    simulate(&Scenario { image, program, link, lead: Duration::ZERO }, policy).expect("the policy does its work")
}

#[test]
fn demand_only_costs_a_round_trip_and_its_bytes_per_chunk() {
    let image = small_image();
    // 100 kB at 100 Mbit/s is 8 ms.
    let program = Program::new(&image, &reads(&[(1, 0, 1), (3, 64, 1), (5, 1, 1)]), ms(10));
    let outcome = run(&image, &program, link(100.0, 20), &mut DemandOnly::default());
    assert_eq!(outcome.ready.as_micros(), 10_000 + 20_000 + 8_000 + 20_000 + 4_000);
    assert_eq!((outcome.requests, outcome.bytes, outcome.misses), (2, 150_000, 2));
    assert_eq!((outcome.hits, outcome.late_hits, outcome.duplicate_bytes), (0, 0, 0));
    assert_eq!(outcome.stall.as_micros(), 52_000);
}

#[test]
fn a_read_across_two_chunks_waits_for_both_at_the_same_time() {
    let image = small_image();
    let program = Program::new(&image, &reads(&[(0, 63, 2)]), Duration::ZERO);
    let outcome = run(&image, &program, link(100.0, 20), &mut DemandOnly::default());
    assert_eq!((outcome.ready.as_micros(), outcome.misses), (20_000 + 12_000, 2));
    assert_eq!(outcome.ready, program.bound(&image, link(100.0, 20), Duration::ZERO).ready + Duration::from_nanos(2));
}

#[test]
fn one_connection_in_order_costs_a_round_trip_each_and_hides_the_thinking() {
    let image = small_image();
    let program = Program::new(&image, &reads(&[(5, 0, 1), (10, 64, 1)]), ms(10));
    let outcome = run(&image, &program, link(100.0, 20), &mut Fifo::new(1, &[layer(0), layer(1), layer(2)]));
    assert_eq!(outcome.ready.as_micros(), 20_000 + 8_000 + 20_000 + 4_000);
    assert_eq!((outcome.late_hits, outcome.misses), (2, 0), "the read joins what the trace asked for");
    assert_eq!(outcome.wasted_bytes, 25_000, "all that was asked for is waited for, and counted");
}

#[test]
fn a_lead_is_before_the_program() {
    let image = small_image();
    let program = Program::new(&image, &reads(&[(5, 0, 1)]), ms(10));
    let scenario = Scenario { image: &image, program: &program, link: link(100.0, 20), lead: ms(100) };
    let outcome = simulate(&scenario, &mut Fifo::new(16, &[layer(0)])).expect("it works");
    assert_eq!((outcome.ready, outcome.hits), (ms(10), 1));
    assert_eq!(program.bound(&image, scenario.link, scenario.lead).ready, ms(10));
}

#[test]
fn thinking_is_scaled_to_the_warm_time_and_what_is_left_is_the_tail() {
    let image = small_image();
    let recorded = reads(&[(-50, 0, 1), (10, 64, 1), (20, 128, 1)]);
    let thinks = |program: &Program| program.reads.iter().map(|read| read.think).collect::<Vec<_>>();
    let slow = Program::new(&image, &recorded, ms(10));
    assert_eq!((thinks(&slow), slow.tail), (vec![ms(0), ms(5), ms(5)], ms(0)));
    let early = Program::new(&image, &recorded, ms(50));
    assert_eq!((thinks(&early), early.tail), (vec![ms(0), ms(10), ms(10)], ms(30)));
}

#[test]
fn a_block_outside_the_hot_blob_costs_its_chunk() {
    let frames = [FrameSize { blocks: 2, stored_len_bytes: 1000 }, FrameSize { blocks: 1, stored_len_bytes: 600 }];
    let image = small_image().with_hot_blob(&frames, &[70, 5, 200]);
    let units = image.units_of(RecordedRead { at_us: 0, block: 69, blocks: 3 });
    assert_eq!(units, [layer(1), ChunkKey { blob: HOT, chunk: 0 }]);
    let first = image.first_uses(&reads(&[(0, 200, 1), (1, 5, 1), (2, 70, 1), (3, 0, 1)]));
    assert_eq!(first, [ChunkKey { blob: HOT, chunk: 1 }, ChunkKey { blob: HOT, chunk: 0 }, layer(0)]);
}

#[test]
fn a_chunk_that_was_not_measured_compresses_like_those_that_were() {
    let size = ChunkSize { chunk: 1, raw_len_bytes: 262_144, stored_len_bytes: 65_536 };
    let image = SimulatedImage::new(3 << 18, &[size]);
    assert_eq!(image.chunks().iter().map(|size| size.stored_len_bytes).collect::<Vec<_>>(), [65_536; 3]);
    assert_eq!(image.stored_bytes(), 3 * 65_536);
}

/// Orders what it was made to order at the first event, and nothing afterwards.
struct Fixed(Vec<Order>);

impl Policy for Fixed {
    fn on(&mut self, _: Happened<'_>, _: crate::types::Now, orders: &mut Vec<Order>) {
        orders.append(&mut self.0);
    }
}

#[test]
fn a_policy_that_does_not_do_its_work_is_found_out() {
    let image = small_image();
    let program = Program::new(&image, &reads(&[(5, 0, 1)]), ms(10));
    let scenario = Scenario { image: &image, program: &program, link: link(100.0, 20), lead: Duration::ZERO };
    let attempt = |orders| simulate(&scenario, &mut Fixed(orders)).expect_err("it does not work");
    let fetch = |units| Order::Fetch { fetch: 0, blob: LAYER, units };
    assert_eq!(attempt(vec![]), SimulationError::Stuck { ticket: 0 });
    assert_eq!(attempt(vec![fetch(0..1)]), SimulationError::WrongWake { ticket: 0 }, "it is not woken");
    assert_eq!(attempt(vec![Order::Wake { ticket: 0 }]), SimulationError::WrongWake { ticket: 0 });
    assert_eq!(attempt(vec![fetch(3..5)]), SimulationError::WrongRange);
    let outcome = simulate(&scenario, &mut Fifo::new(2, &[layer(0), layer(0)])).expect("it works");
    assert_eq!(outcome.duplicate_bytes, 0);
}

/// A start that jumps about an image of 64 chunks, with runs of neighbours in between.
fn jumping(steps: &[(u32, u8, u16)]) -> (SimulatedImage, Vec<RecordedRead>) {
    let size = |chunk: u32| ChunkSize {
        chunk,
        raw_len_bytes: 262_144,
        stored_len_bytes: 20_000 + chunk.wrapping_mul(2_654_435_761) % 120_000,
    };
    let image = SimulatedImage::new(64 << 18, &(0..64).map(size).collect::<Vec<_>>());
    let (mut at_us, mut recorded) = (-1000, Vec::new());
    for &(block, run, think_us) in steps {
        for step in 0..u32::from(run % 5) + 1 {
            at_us += i64::from(think_us) / i64::from(step + 1);
            recorded.push(RecordedRead { at_us, block: (block + 40 * step) % 4000, blocks: 1 + step * 8 });
        }
    }
    (image, recorded)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_bound_is_below_every_policy_and_the_same_run_ends_the_same(
        steps in prop::collection::vec((0_u32..4000, any::<u8>(), 0_u16..4000), 1..60),
        (connections, shuffle) in (1_usize..40, any::<u64>()),
        (mbit_per_s, round_trip_ms, lead_ms) in (1.0_f64..2000.0, 0_u64..40, 0_u64..20),
        warm_ms in 0_u64..200,
    ) {
        let (image, recorded) = jumping(&steps);
        let program = Program::new(&image, &recorded, ms(warm_ms));
        let link = link(mbit_per_s, round_trip_ms);
        let scenario = Scenario { image: &image, program: &program, link, lead: ms(lead_ms) };
        let bound = program.bound(&image, link, scenario.lead);
        let order = image.first_uses(&recorded);
        let mut shuffled = order.clone();
        shuffled.sort_by_key(|unit| (u64::from(unit.chunk) ^ shuffle).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let policies: [&dyn Fn() -> Box<dyn Policy>; 3] = [
            &|| Box::new(DemandOnly::default()),
            &|| Box::new(Fifo::new(connections, &order)),
            &|| Box::new(Fifo::new(connections, &shuffled)),
        ];
        for policy in policies {
            let outcome = simulate(&scenario, &mut *policy()).expect("it works");
            // The link delivers to the nanosecond, so a unit comes at most that much too early.
            prop_assert!(outcome.ready + Duration::from_nanos(1000) >= bound.ready, "{outcome:?} {bound:?}");
            prop_assert_eq!(outcome.duplicate_bytes, 0);
            prop_assert_eq!(outcome.hits + outcome.late_hits + outcome.misses, u64::from(bound.units));
            prop_assert_eq!(outcome.bytes, bound.bytes + outcome.wasted_bytes);
            prop_assert_eq!(simulate(&scenario, &mut *policy()).expect("it works"), outcome);
        }
    }
}
