//! Traces as bytes: round trips, damage, bounds.
#![allow(clippy::cast_possible_truncation, reason = "small numbers of test code")]

use proptest::prelude::*;

use super::*;
use crate::ErrorKind;

/// A header with that many blobs.
pub(crate) fn header(blobs: usize) -> impl Strategy<Value = TraceHeader> {
    let ready = prop_oneof![Just(None), (0..=READY_US_MAX).prop_map(Some)];
    let command = prop::collection::vec("[a-zä/ ]{0,12}", 0..5);
    (any::<[u8; 32]>(), command, any::<u32>(), 1..=u32::MAX, ready, any::<u64>()).prop_map(
        move |(manifest, command, read_ahead_kb, runs, ready_us, lost)| TraceHeader {
            manifest: Sha256(manifest),
            command,
            read_ahead_kb,
            runs,
            ready_us,
            lost,
            blobs: (0..blobs).map(blob).collect(),
        },
    )
}

/// The digest of a made-up blob.
pub(crate) fn blob(number: usize) -> Sha256 {
    Sha256::of(&number.to_le_bytes())
}

/// Entries that may overlap, in few blobs.
pub(crate) fn entries(blobs: usize) -> impl Strategy<Value = Vec<TraceEntry>> {
    let block = prop_oneof![8 => 0u32..2000, 1 => 0..MAX_BLOCKS - 256];
    let blocks = prop_oneof![4 => Just(1u16), 2 => 1..=8u16, 1 => 1..=ENTRY_BLOCKS_MAX];
    let gap = prop_oneof![4 => 0..40u64, 3 => 0..100_000u64, 1 => 0..=GAP_US_MAX];
    let confidence = prop_oneof![3 => Just(255u8), 1 => 1..=255u8];
    let entry = (0..blobs as u16, block, blocks, gap, confidence).prop_map(
        |(blob, block, blocks, since_previous_us, confidence)| TraceEntry {
            blob,
            block,
            blocks,
            since_previous_us,
            confidence,
        },
    );
    prop::collection::vec(entry, 0..60)
}

/// A trace with up to four blobs.
pub(crate) fn trace() -> impl Strategy<Value = Trace> {
    (1..5usize)
        .prop_flat_map(|blobs| (header(blobs), entries(blobs)))
        .prop_map(|(header, entries)| Trace { header, entries: coalesce(entries) })
}

proptest! {
    #[test]
    fn reads_back(trace in trace()) {
        let bytes = trace.encode().unwrap();
        for cut in 0..bytes.len() {
            prop_assert!(Trace::decode(&bytes[..cut]).is_err());
        }
        prop_assert_eq!(Trace::decode(&bytes), Ok(trace));
    }

    /// Every trace has one form, and what is read is within the bounds.
    #[test]
    fn damage_is_refused_or_sound(
        trace in trace(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = trace.encode().unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(read) = Trace::decode(&bytes) {
            prop_assert_eq!(read.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn coalescing_keeps_first_reads_in_order(entries in entries(3)) {
        let mut seen = std::collections::HashSet::new();
        let first: Vec<_> = ranks::traced_blocks(&entries)
            .filter(|block| seen.insert((block.blob, block.block)))
            .collect();
        let coalesced = coalesce(entries);
        let blocks: Vec<_> = ranks::traced_blocks(&coalesced).collect();
        prop_assert_eq!(blocks.len(), first.len());
        let slack_us = COALESCE_GAP_US;
        for (block, first) in blocks.iter().zip(&first) {
            prop_assert_eq!(
                (block.blob, block.block, block.confidence),
                (first.blob, first.block, first.confidence)
            );
            prop_assert!(block.due_us <= first.due_us);
            prop_assert!(first.due_us - block.due_us <= slack_us || first.due_us > GAP_US_MAX);
        }
        for entry in &coalesced {
            prop_assert_eq!(entry.fault(3), None);
        }
    }

    #[test]
    fn ranks_are_places_in_the_order(trace in trace()) {
        let ranks = trace.ranks();
        prop_assert_eq!(ranks.blocks(), trace.blocks());
        for (rank, block) in trace.traced_blocks().enumerate() {
            prop_assert_eq!(ranks.of(block.blob, block.block), Some(rank as u32));
            let next = block.block + 1;
            let listed = trace.traced_blocks().any(|other| (other.blob, other.block) == (block.blob, next));
            prop_assert_eq!(ranks.of(block.blob, next).is_some(), listed);
        }
        prop_assert_eq!(ranks.of(9, 0), None);
    }

    #[test]
    fn a_log_is_good_up_to_any_cut(
        header in header(3),
        batches in prop::collection::vec(entries(3), 0..5),
        end in (prop_oneof![Just(None), (0..=READY_US_MAX).prop_map(Some)], 0..1000u64),
        cut in any::<prop::sample::Index>(),
        tail in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0..40),
    ) {
        let end = LogEnd { ready_us: end.0, lost: end.1 };
        let mut bytes = TraceLog::begin(&header).unwrap();
        let begun = bytes.len();
        let mut whole = vec![(begun, 0)];
        let mut appended = Vec::new();
        for batch in &batches {
            appended.extend_from_slice(batch);
            bytes.extend(TraceLog::append(&header, batch).unwrap());
            whole.push((bytes.len(), appended.len()));
        }
        let full = [&bytes[..], &TraceLog::finish(end).unwrap()].concat();
        let log = TraceLog::decode(&full).unwrap();
        prop_assert_eq!((&log.header, &log.entries, log.end), (&header, &appended, Some(end)));
        let trace = log.into_trace().unwrap();
        prop_assert_eq!(trace.header.ready_us, end.ready_us);
        prop_assert_eq!(&trace.entries, &coalesce(appended.iter().copied()));

        // Cut anywhere after the header, with what a crash may leave behind.
        let cut = begun + cut.index(bytes.len() - begun + 1);
        let cut_bytes = [&bytes[..cut], &tail].concat();
        let log = TraceLog::decode(&cut_bytes).unwrap();
        let (whole_len, count) = *whole.iter().rev().find(|(len, _)| *len <= cut).unwrap();
        if tail.iter().all(|byte| *byte == 0) && bytes[whole_len..cut].is_empty() {
            prop_assert_eq!(log.whole_len_bytes, whole_len as u64);
            prop_assert_eq!(&log.entries, &appended[..count]);
        }
        prop_assert!(log.entries.len() >= count && log.entries[..] == appended[..log.entries.len()]);
        prop_assert!(TraceLog::decode(&bytes[..begun - 1]).is_err());
    }
}

fn sample() -> Trace {
    let header = TraceHeader {
        manifest: Sha256::of(b"manifest"),
        command: vec!["nginx".to_owned(), "-g".to_owned()],
        read_ahead_kb: 128,
        runs: 2,
        ready_us: Some(0x1234),
        lost: 3,
        blobs: vec![blob(0), blob(1)],
    };
    let first = TraceEntry { blob: 0, block: 5, blocks: 1, since_previous_us: 300, confidence: 255 };
    let entries = vec![first, TraceEntry { blob: 1, block: 0, blocks: 256, since_previous_us: 0, confidence: 128 }];
    Trace { header, entries }
}

#[test]
fn bytes_are_as_in_the_tables() {
    let bytes = sample().encode().unwrap();
    assert_eq!(bytes[..8], *b"UBTR\x01\0\x01\0");
    assert_eq!(bytes[8..40], Sha256::of(b"manifest").0);
    assert_eq!(bytes[40..48], [128, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(bytes[48..64], [0x34, 0x12, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[64..68], [2, 0, 2, 0]);
    assert_eq!(bytes[68..83], *b"\x05\0\0\0nginx\x02\0\0\0-g");
    assert_eq!(bytes[83..147], [blob(0).0, blob(1).0].concat());
    assert_eq!(bytes[147..151], [2, 0, 0, 0]);
    // One block, 5 after 0, 300 us; then 256 blocks of blob 1 with confidence 128, at its start.
    assert_eq!(bytes[151..], [0, 10, 0xac, 0x02, 0xff, 0x07, 1, 0, 0, 128]);
}

#[test]
fn the_command_is_known_by_its_arguments() {
    assert_eq!(sample().command_digest(), Sha256::of(b"nginx\0-g\0"));
    assert_ne!(command_digest(&["a b"]), command_digest(&["a", "b"]));
}

#[test]
fn what_is_out_of_bounds_is_not_written() {
    let kind = |change: fn(&mut Trace)| {
        let mut trace = sample();
        change(&mut trace);
        trace.encode().unwrap_err().kind()
    };
    let faults: &[fn(&mut Trace)] = &[
        |trace| trace.header.runs = 0,
        |trace| trace.header.ready_us = Some(READY_US_MAX + 1),
        |trace| trace.header.command.push("a\0b".to_owned()),
        |trace| trace.header.command = vec![String::new(); COMMAND_ARGS_MAX + 1],
        |trace| trace.header.command = vec!["x".repeat(COMMAND_BYTES_MAX + 1)],
        |trace| trace.header.blobs.push(blob(0)),
        |trace| trace.header.blobs = (0..=MAX_DEVICES).map(blob).collect(),
        |trace| trace.entries[0].blob = 2,
        |trace| trace.entries[0].blocks = 0,
        |trace| trace.entries[0].blocks = 257,
        |trace| trace.entries[0].block = MAX_BLOCKS,
        |trace| trace.entries[0].since_previous_us = GAP_US_MAX + 1,
        |trace| trace.entries[0].confidence = 0,
        |trace| trace.entries[0] = TraceEntry { block: 255, ..trace.entries[1] },
    ];
    for (number, fault) in faults.iter().enumerate() {
        assert_eq!(kind(*fault), ErrorKind::Invalid, "fault {number}");
    }
}

#[test]
fn the_longest_trace_fits_and_one_entry_more_does_not() {
    let mut trace = sample();
    trace.header.blobs = (0..MAX_DEVICES).map(blob).collect();
    trace.header.command = vec!["x".repeat(COMMAND_BYTES_MAX / COMMAND_ARGS_MAX); COMMAND_ARGS_MAX];
    trace.entries = (0..TRACE_ENTRIES_MAX as u32)
        .map(|number| TraceEntry {
            blob: 500 + (number % 2) as u16,
            block: if number / 2 % 2 == 0 { number * 300 } else { MAX_BLOCKS - number * 300 - 256 },
            blocks: 256,
            since_previous_us: GAP_US_MAX,
            confidence: 1 + (number % 2) as u8,
        })
        .collect();
    let bytes = trace.encode().unwrap();
    assert!(bytes.len() <= TRACE_BYTES_MAX, "{} bytes", bytes.len());
    assert!(trace.span_us() <= READY_US_MAX);
    assert_eq!(Trace::decode(&bytes).unwrap(), trace);
    trace.entries.push(TraceEntry { blob: 0, ..trace.entries[0] });
    assert_eq!(trace.encode().unwrap_err().kind(), ErrorKind::TooLarge);
}

#[test]
fn counts_are_not_trusted_with_memory() {
    let mut bytes = sample().encode().unwrap();
    bytes[147..151].copy_from_slice(&(TRACE_ENTRIES_MAX as u32).to_le_bytes());
    assert_eq!(Trace::decode(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
}
