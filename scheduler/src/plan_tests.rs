use super::*;
use crate::types::BlobKey;

fn key(chunk: u32) -> ChunkKey {
    ChunkKey { blob: BlobKey(1), chunk }
}

fn entry(chunk: u32, confidence: u8) -> PlanEntry {
    PlanEntry { chunk: key(chunk), due: Now::ZERO, confidence }
}

fn plan(chunks: impl Iterator<Item = u32>) -> Plan {
    let entries: Vec<PlanEntry> = chunks.map(|chunk| entry(chunk, 255)).collect();
    Plan::new(&entries, u64::MAX, |_| true)
}

/// The next `count` chunks that the plan asks for.
fn take(plan: &mut Plan, count: usize) -> Vec<u32> {
    let mut taken: Vec<u32> = Vec::new();
    while taken.len() < count {
        let want = |chunk: ChunkKey| if taken.contains(&chunk.chunk) { Want::Nothing } else { Want::Fetch };
        let Some((_, chunk)) = plan.peek(Now::ZERO, want) else { break };
        taken.push(chunk.chunk);
    }
    taken
}

#[test]
fn entries_come_in_order_each_once_and_unknown_ones_not_at_all() {
    let entries = [5, 3, 5, 99, 4].map(|chunk| entry(chunk, 255));
    let mut plan = Plan::new(&entries, u64::MAX, |chunk| chunk.chunk < 50);
    assert_eq!(take(&mut plan, 10), [5, 3, 4]);
    assert!(plan.is_over());
}

#[test]
fn unsure_entries_come_last_and_doubtful_ones_never() {
    let entries = [entry(1, 255), entry(2, 60), entry(3, 50), entry(4, 128)];
    let mut plan = Plan::new(&entries, u64::MAX, |_| true);
    assert_eq!(take(&mut plan, 10), [1, 4, 2]);
}

#[test]
fn a_narrowed_plan_keeps_to_what_it_is_sure_of() {
    let entries = [entry(1, 255), entry(2, 60)];
    let mut plan = Plan::new(&entries, u64::MAX, |_| true);
    plan.read(key(50), true, Now::ZERO);
    assert_eq!(plan.level(), Level::Narrowed);
    let want = |_| Want::Fetch;
    assert_eq!(plan.peek(PAUSE, want), Some((0, key(1))));
    let want = |chunk: ChunkKey| if chunk.chunk == 1 { Want::Nothing } else { Want::Fetch };
    assert_eq!(plan.peek(PAUSE, want), None);
    assert!(!plan.is_over());
}

#[test]
fn a_read_that_it_does_not_know_pauses_it_until_one_that_it_knows() {
    let mut plan = plan(0..100);
    for chunk in 0..10 {
        plan.read(key(chunk), true, Now::ZERO);
    }
    plan.read(key(500), true, Now::ZERO);
    assert_eq!(take(&mut plan, 1), []);
    assert_eq!(plan.retry_at(), Some(PAUSE));
    plan.read(key(10), true, Now::ZERO);
    assert_eq!(take(&mut plan, 1), [0]);
}

#[test]
fn what_is_pushed_need_not_be_read() {
    let follow = |is_pushed: bool| {
        let mut plan = plan(0..4000);
        take(&mut plan, 4000);
        for chunk in 0..4000 {
            if chunk % 8 == 7 {
                plan.read(key(chunk), true, Now::ZERO);
            } else if is_pushed {
                plan.pushed(key(chunk));
            }
        }
        plan.pushed(key(5000));
        plan.level()
    };
    assert_eq!(follow(true), Level::Followed);
    assert_eq!(follow(false), Level::Dropped);
}

#[test]
fn reads_that_a_plan_does_not_know_drop_it_whatever_is_pushed() {
    let mut plan = plan(0..4000);
    (0..1000).for_each(|chunk| plan.pushed(key(chunk)));
    plan.read(key(5000), true, Now::ZERO);
    plan.read(key(5001), true, Now::ZERO);
    assert_eq!(plan.level(), Level::Dropped);
}

#[test]
fn a_reader_far_ahead_is_followed_and_what_was_skipped_comes_last() {
    let mut plan = plan(0..1000);
    assert_eq!(take(&mut plan, 10).len(), 10);
    for chunk in 0..20 {
        plan.read(key(chunk), true, Now::ZERO);
    }
    for chunk in [500, 501, 502] {
        plan.read(key(chunk), true, Now::ZERO);
    }
    let order = take(&mut plan, 2000);
    assert_eq!(order[..3], [500, 501, 502]);
    assert_eq!(order[499..502], [999, 9, 10]);
    assert_eq!(order.len(), 991);
}

#[test]
fn reads_in_another_order_nearby_move_nothing() {
    let mut plan = plan(0..1000);
    for chunk in [0, 60, 3, 40, 20, 64, 1] {
        plan.read(key(chunk), true, Now::ZERO);
    }
    assert_eq!(take(&mut plan, 3), [0, 1, 2]);
}

#[test]
fn a_plan_without_order_jumps_for_a_bounded_number_of_times_and_loses_nothing() {
    let mut plan = plan(0..10_000);
    for step in 0..9_000_u32 {
        plan.read(key(step * 7919 % 10_000), true, Now::ZERO);
        assert!(plan.skipped.len() <= 2 * JUMPS_MAX as usize + 1);
    }
    let parts = plan.skipped.iter().chain([&plan.current]).map(ExactSizeIterator::len).sum::<usize>();
    assert_eq!(parts, 10_000);
}

#[test]
fn what_failed_is_asked_for_again_at_the_end_and_not_for_ever() {
    let mut plan = plan(0..3);
    let later = Now::from_secs(1);
    assert_eq!(plan.peek(Now::ZERO, |_| Want::Fetch), Some((0, key(0))));
    assert!(plan.failed(key(0), 1, later));
    let want = |chunk: ChunkKey| if chunk.chunk == 0 { Want::Later(later) } else { Want::Nothing };
    assert_eq!(plan.peek(Now::ZERO, want), None);
    assert_eq!(plan.retry_at(), Some(later));
    assert!(plan.peek(later, |_| Want::Fetch).is_some());
    assert!(!plan.failed(key(0), RETRIES_MAX + 1, later));
}

#[test]
fn a_chunk_read_in_place_of_a_frame_is_not_held_against_the_plan() {
    let mut plan = plan(0..100);
    for frame in 0..50 {
        plan.avoided();
        plan.read(key(frame), true, Now::ZERO);
        plan.read(key(1000 + frame), true, Now::ZERO);
    }
    assert_eq!(plan.level(), Level::Followed);
}
