//! Traces, their logs, hot tables, and what is done with traces.

use std::collections::HashSet;

use ublkimg_image::chunk_index::MAX_STORED_CHUNK_BYTES;
use ublkimg_image::hot::{HOT_FRAME_BLOCKS_MAX, HOT_FRAMES_MAX};
use ublkimg_image::trace::{
    COMMAND_ARGS_MAX, COMMAND_BYTES_MAX, ENTRY_BLOCKS_MAX, GAP_US_MAX, LogEnd, READY_US_MAX, TRACE_ENTRIES_MAX, diff,
    merge,
};
use ublkimg_image::{HotFrame, HotTable, MAX_BLOCKS, MAX_DEVICES, Sha256, Trace, TraceEntry, TraceHeader, TraceLog};

use crate::sample;

/// Most blocks that a target looks at one by one.
const BLOCKS_MAX: u64 = 100_000;

/// Memory that a decoded trace may take: a small multiple of its bytes. An entry of 3 bytes takes 24, an argument of 4
/// takes 24 and what the allocator adds, and a list has up to twice the room it needs.
fn memory_max(input: &[u8]) -> usize {
    16 * input.len() + 4096
}

pub(crate) fn trace(data: &[u8]) {
    let Ok(trace) = Trace::decode(data) else {
        return;
    };
    let header = &trace.header;
    let entries = trace.entries.capacity() * size_of::<TraceEntry>();
    assert!(header_memory(header) + entries <= memory_max(data));
    within_bounds(&trace);
    assert_eq!(trace.encode().expect("what was decoded"), data);
    if trace.blocks() <= BLOCKS_MAX {
        let ranks = trace.ranks();
        let mut seen = HashSet::new();
        for (rank, block) in (0..).zip(trace.traced_blocks()) {
            assert_eq!(ranks.of(block.blob, block.block), Some(rank));
            assert!(seen.insert((block.blob, block.block)), "a block is in the trace twice");
        }
    }
}

fn header_memory(header: &TraceHeader) -> usize {
    let arguments: usize = header.command.iter().map(String::capacity).sum();
    header.command.capacity() * size_of::<String>() + arguments + header.blobs.capacity() * size_of::<Sha256>()
}

fn header_within_bounds(header: &TraceHeader) {
    assert!(header.command.len() <= COMMAND_ARGS_MAX && header.blobs.len() <= MAX_DEVICES);
    assert!(header.command.iter().map(String::len).sum::<usize>() <= COMMAND_BYTES_MAX);
    assert!(header.command.iter().all(|argument| !argument.contains('\0')));
    assert!(header.runs >= 1 && header.ready_us.is_none_or(|ready_us| ready_us <= READY_US_MAX));
    assert_eq!(header.blobs.iter().collect::<HashSet<_>>().len(), header.blobs.len());
}

fn entry_within_bounds(header: &TraceHeader, entry: &TraceEntry) {
    assert!(usize::from(entry.blob) < header.blobs.len());
    assert!((1..=ENTRY_BLOCKS_MAX).contains(&entry.blocks) && entry.confidence >= 1);
    assert!(u64::from(entry.block) + u64::from(entry.blocks) <= u64::from(MAX_BLOCKS));
    assert!(entry.since_previous_us <= GAP_US_MAX);
}

fn within_bounds(trace: &Trace) {
    header_within_bounds(&trace.header);
    assert!(trace.entries.len() <= TRACE_ENTRIES_MAX && trace.span_us() <= READY_US_MAX);
    for entry in &trace.entries {
        entry_within_bounds(&trace.header, entry);
    }
}

pub(crate) fn trace_log(data: &[u8]) {
    check_log(data);
    check_log(&resealed(data));
}

fn check_log(data: &[u8]) {
    let Ok(log) = TraceLog::decode(data) else {
        return;
    };
    let entries = log.entries.capacity() * size_of::<TraceEntry>();
    assert!(header_memory(&log.header) + entries <= memory_max(data));
    header_within_bounds(&log.header);
    assert!(log.entries.len() <= TRACE_ENTRIES_MAX);
    for entry in &log.entries {
        entry_within_bounds(&log.header, entry);
    }
    // A recorder goes on after the last whole record.
    let whole = &data[..usize::try_from(log.whole_len_bytes).expect("a length within the input")];
    assert_eq!(TraceLog::decode(whole).as_ref(), Ok(&log));
    let more = [TraceEntry { blob: 0, block: 7, blocks: 1, since_previous_us: 1, confidence: 255 }];
    let more = &more[..usize::from(!log.header.blobs.is_empty())];
    let appended = TraceLog::append(&log.header, more).expect("good entries");
    let ended = TraceLog::finish(LogEnd { ready_us: Some(1), lost: 0 }).expect("a good end");
    let continued = TraceLog::decode(&[whole, &appended, &ended].concat()).expect("a whole log");
    assert_eq!(continued.entries.len(), log.entries.len() + more.len());
    within_bounds(&log.into_trace().expect("what was decoded"));
    let trace = continued.into_trace().expect("what was decoded");
    assert_eq!(trace.header.ready_us, Some(1));
    assert_eq!(Trace::decode(&trace.encode().expect("a trace within its bounds")).as_ref(), Ok(&trace));
}

/// The records of a log with good checksums, so that changed payloads are looked at.
fn resealed(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    let mut at = 0;
    while let Some([l0, l1, l2, l3, ..]) = data.get(at..at + 8) {
        let len = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
        let Some(payload) = data.get(at + 8..).and_then(|rest| rest.get(..len)) else {
            break;
        };
        let checksum = crc32c::crc32c(payload);
        data[at + 4..at + 8].copy_from_slice(&checksum.to_le_bytes());
        at += 8 + len;
    }
    data
}

pub(crate) fn hot_table(data: &[u8]) {
    let Ok(table) = HotTable::decode(data) else {
        return;
    };
    assert!(table.frames.len() <= HOT_FRAMES_MAX);
    assert!(table.frames.capacity() * size_of::<HotFrame>() <= memory_max(data));
    assert_eq!(table.encode().expect("what was decoded"), data);
    assert_eq!(table.digest(), Ok(Sha256::of(data)));
    let layout = table.layout();
    let (mut offset, mut rank) = (0, 0);
    for (number, frame) in (0..).zip(&table.frames) {
        assert!((1..=HOT_FRAME_BLOCKS_MAX).contains(&frame.blocks));
        assert!((1..=MAX_STORED_CHUNK_BYTES).contains(&u64::from(frame.stored_len_bytes)));
        assert_eq!((layout.stored(number).start, layout.ranks(number).start), (offset, rank));
        (offset, rank) = (layout.stored(number).end, layout.ranks(number).end);
        assert_eq!((layout.frame_of(rank - 1), layout.ranks(number).len()), (Some(number), usize::from(frame.blocks)));
    }
    assert_eq!((table.stored_len_bytes(), table.blocks(), layout.frame_of(rank)), (offset, rank, None));
}

/// Two traces, the first with its length (u16) before it: merged in both orders and compared.
pub(crate) fn operations(data: &[u8]) {
    let Some(([low, high], rest)) = data.split_first_chunk::<2>().map(|(len, rest)| (*len, rest)) else {
        return;
    };
    let Some((first, second)) = rest.split_at_checked(usize::from(u16::from_le_bytes([low, high]))) else {
        return;
    };
    let (Ok(a), Ok(b)) = (Trace::decode(first), Trace::decode(second)) else {
        return;
    };
    let result = diff(&a, &b).expect("good traces");
    assert_eq!(result.common_blocks + result.only_a_blocks, a.blocks());
    assert_eq!(result.common_blocks + result.only_b_blocks, b.blocks());
    assert!(result.jaccard_ppm <= 1_000_000 && result.order_ppm.is_none_or(|ppm| ppm.abs() <= 1_000_000));
    let merged = merge(&[a.clone(), b.clone()], true).expect("few blobs");
    within_bounds(&merged);
    assert!(merged.encode().is_ok());
    assert_eq!(merged.blocks(), result.common_blocks + result.only_a_blocks + result.only_b_blocks);
    let other_way = merge(&[b, a], true).expect("few blobs");
    assert_eq!((other_way.blocks(), other_way.header.runs), (merged.blocks(), merged.header.runs));
}

pub(crate) fn trace_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = [0, 1, 2, 30, 200].map(|entries| sample::trace(entries).encode().expect("good")).into();
    let mut bare = sample::trace(3);
    (bare.header.command, bare.header.ready_us) = (Vec::new(), None);
    bare.entries[0].since_previous_us = GAP_US_MAX;
    seeds.push(bare.encode().expect("good"));
    seeds
}

pub(crate) fn trace_log_seeds() -> Vec<Vec<u8>> {
    let trace = sample::trace(50);
    let mut log = TraceLog::begin(&trace.header).expect("good");
    let mut seeds = vec![log.clone()];
    for batch in trace.entries.chunks(20) {
        log.extend(TraceLog::append(&trace.header, batch).expect("good"));
        seeds.push(log.clone());
    }
    seeds.push([&log[..], &[0; 20]].concat());
    log.extend(TraceLog::finish(LogEnd { ready_us: Some(5), lost: 3 }).expect("good"));
    seeds.push(log);
    seeds
}

pub(crate) fn hot_table_seeds() -> Vec<Vec<u8>> {
    [0, 1, 2, 20].map(|frames| sample::hot_table(frames).encode().expect("good")).into()
}

pub(crate) fn operation_seeds() -> Vec<Vec<u8>> {
    let pair = |first: &Trace, second: &Trace| {
        let first = first.encode().expect("good");
        let len = u16::try_from(first.len()).expect("a short one");
        [&len.to_le_bytes()[..], &first, &second.encode().expect("good")].concat()
    };
    let (short, long) = (sample::trace(5), sample::trace(60));
    let mut other = long.clone();
    other.header.blobs = vec![sample::blob(2), sample::blob(7)];
    other.entries.reverse();
    vec![pair(&short, &long), pair(&long, &long), pair(&long, &other)]
}
