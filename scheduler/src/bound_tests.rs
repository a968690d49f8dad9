//! The bound against cases computed by hand, and against every order of fetching.

use proptest::prelude::*;

use super::*;

const MS: f64 = 0.001;

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn unit(stored_len_bytes: u64, raw_len_bytes: u64) -> Unit {
    Unit { stored_len_bytes, raw_len_bytes }
}

fn read(unit: u32, think_ms: u64) -> UnitRead {
    UnitRead { unit, think: ms(think_ms) }
}

/// 1000 bytes per ms, 20 ms to the first byte.
const LINK: BoundLink =
    BoundLink { bandwidth_bytes_per_s: 1_000_000.0, first_byte: Duration::from_millis(20), slow_start: None };

fn start<'a>(units: &'a [Unit], reads: &'a [UnitRead]) -> Start<'a> {
    Start { units, reads, tail: Duration::ZERO, link: LINK, lead: Duration::ZERO, decode: None, processors: None }
}

#[test]
fn nothing_to_read_is_the_tail() {
    let bound = lower_bound(&Start { tail: ms(7), ..start(&[], &[]) });
    assert_eq!((bound.ready, bound.warm, bound.bytes, bound.units), (ms(7), ms(7), 0, 0));
}

#[test]
fn a_link_bound_start_is_the_bytes_and_the_thinking_after_the_last() {
    // Arrivals 20+10, 20+30, 20+60; the reads come at 1, 2, 3 ms and wait for each.
    let units = [unit(30_000, 0), unit(10_000, 0), unit(20_000, 0)];
    let reads = [read(1, 1), read(2, 1), read(0, 1), read(1, 4)];
    let bound = lower_bound(&Start { tail: ms(5), ..start(&units, &reads) });
    assert_eq!(bound.ready, ms(80 + 4 + 5));
    assert_eq!((bound.warm, bound.bytes, bound.units), (ms(12), 60_000, 3));
    assert_eq!(bound.any_order, bound.ready);
}

#[test]
fn a_thinking_start_is_the_warm_time() {
    let units = [unit(10_000, 0), unit(10_000, 0)];
    let bound = lower_bound(&start(&units, &[read(0, 50), read(1, 50)]));
    assert_eq!((bound.ready, bound.warm), (ms(100), ms(100)));
}

#[test]
fn a_wait_in_the_middle_is_not_hidden_by_later_thinking() {
    // The first read waits until 20+100, then 500 ms of thinking, long after the second unit has come.
    let units = [unit(100_000, 0), unit(10_000, 0)];
    let bound = lower_bound(&start(&units, &[read(0, 1), read(1, 500)]));
    assert_eq!(bound.ready, ms(120 + 500));
}

#[test]
fn a_lead_moves_the_arrivals_and_never_makes_them_negative() {
    let units = [unit(30_000, 0)];
    let reads = [read(0, 1)];
    let at = |lead| lower_bound(&Start { lead: ms(lead), ..start(&units, &reads) }).ready;
    assert_eq!((at(0), at(10), at(49), at(5000)), (ms(50), ms(40), ms(1), ms(1)));
}

#[test]
fn slow_start_doubles_the_window_every_round_trip() {
    // One connection, 10 kB: 10 kB in the first flight, 30 kB after one round trip, 70 kB after two.
    let slow = |connections| SlowStart { connections, window_bytes: 10_000.0, rtt: ms(20) };
    let link = |connections| BoundLink { slow_start: Some(slow(connections)), ..LINK };
    let at = |bytes, connections| {
        lower_bound(&Start { link: link(connections), ..start(&[unit(bytes, 0)], &[read(0, 0)]) }).ready
    };
    assert_eq!(at(10_000, 1), ms(20 + 10), "the rate binds");
    assert_eq!(at(10_001, 1).as_millis(), 20 + 20);
    assert_eq!(at(31_000, 1), ms(20 + 40), "two doublings, though the rate would allow it after 31 ms");
    assert_eq!(at(31_000, 4), ms(20 + 31));
}

#[test]
fn decoding_queues_behind_its_workers() {
    // 1000 raw bytes per ms and worker: 40 ms each; arrivals 30, 40, 50.
    let units = [unit(10_000, 40_000); 3];
    let reads = [read(0, 0), read(1, 0), read(2, 0)];
    let decode = |workers| Some(BoundDecode { workers, bytes_per_s: 1_000_000.0 });
    let at = |workers| lower_bound(&Start { decode: decode(workers), ..start(&units, &reads) });
    assert_eq!(at(1).ready, ms(30 + 3 * 40));
    assert_eq!(at(2).ready, ms(30 + 40 + 40), "the third waits for the first worker");
    assert_eq!(at(3).ready, ms(50 + 40));
    assert_eq!((at(1).any_order, at(3).any_order), (ms(30 + 120), ms(50 + 40)));
}

#[test]
fn processors_are_shared_by_program_serving_and_decoding() {
    let units = [unit(10_000, 40_000)];
    let reads = [read(0, 100)];
    let start = Start {
        decode: Some(BoundDecode { workers: 8, bytes_per_s: 1_000_000.0 }),
        processors: Some(BoundProcessors { count: 2, program: ms(300), serving: ms(60) }),
        ..start(&units, &reads)
    };
    assert_eq!(lower_bound(&start).ready, ms((300 + 60 + 40) / 2));
}

#[test]
fn a_dead_link_is_never_ready_unless_nothing_is_needed() {
    let link = BoundLink { bandwidth_bytes_per_s: 0.0, ..LINK };
    let units = [unit(1, 1)];
    let needed = [read(0, 1)];
    let local = [read(9, 1)];
    assert_eq!(lower_bound(&Start { link, ..start(&units, &needed) }).ready, Duration::MAX);
    assert_eq!(lower_bound(&Start { link, ..start(&units, &local) }).ready, ms(1));
}

/// Fetches the units in `order`, one after another, decodes them as they come, and runs the program.
fn ready_in_order_s(start: &Start<'_>, order: &[usize]) -> f64 {
    let mut link_s = 20.0 * MS;
    let mut workers_s = vec![0.0_f64; start.decode.map_or(1, |decode| decode.workers as usize)];
    let mut there_s = vec![0.0_f64; start.units.len()];
    for &index in order {
        link_s += seconds(start.units[index].stored_len_bytes, start.link.bandwidth_bytes_per_s);
        let decode_s = start.decode.map_or(0.0, |d| seconds(start.units[index].raw_len_bytes, d.bytes_per_s));
        let free_s = workers_s.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("a worker");
        *free_s = if start.decode.is_some() { free_s.max(link_s) + decode_s } else { link_s };
        there_s[index] = *free_s;
    }
    let mut now_s = 0.0_f64;
    for read in start.reads {
        now_s = (now_s + read.think.as_secs_f64()).max(there_s[read.unit as usize]);
    }
    now_s
}

fn permutations(items: &mut Vec<usize>, from: usize, visit: &mut dyn FnMut(&[usize])) {
    if from == items.len() {
        return visit(items);
    }
    for other in from..items.len() {
        items.swap(from, other);
        permutations(items, from + 1, visit);
        items.swap(from, other);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_order_of_fetching_beats_the_bound_and_the_best_one_meets_it(
        sizes in prop::collection::vec((1_u64..60_000, 1_u64..60_000), 1..6),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0_u64..40), 1..12),
        workers in prop::option::of(1_u32..4),
    ) {
        let units: Vec<Unit> = sizes.iter().map(|(stored, raw)| unit(*stored, *raw)).collect();
        let reads: Vec<UnitRead> = reads
            .iter()
            .map(|(index, think)| read(u32::try_from(index.index(units.len())).expect("small"), *think))
            .collect();
        let decode = workers.map(|workers| BoundDecode { workers, bytes_per_s: 1_000_000.0 });
        let start = Start { decode, ..start(&units, &reads) };
        let bound = lower_bound(&start);
        let mut best_s = f64::INFINITY;
        permutations(&mut (0..units.len()).collect(), 0, &mut |order| {
            best_s = best_s.min(ready_in_order_s(&start, order));
        });
        let (ready_s, any_order_s) = (bound.ready.as_secs_f64(), bound.any_order.as_secs_f64());
        prop_assert!(any_order_s <= best_s + 1e-8, "{any_order_s} above {best_s}");
        prop_assert!(ready_s >= best_s - 1e-8, "{ready_s} below the best order, {best_s}");
        if decode.is_none() {
            prop_assert!((ready_s - best_s).abs() < 1e-8, "{ready_s} is not the best, {best_s}");
        }
        prop_assert!(any_order_s <= ready_s + 1e-8);
    }
}
