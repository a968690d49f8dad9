//! What the spool keeps, and how.

use super::*;

fn spool() -> Spool {
    let how = Compress { level: 1, threads: std::num::NonZeroUsize::MIN };
    Spool::new(&std::env::temp_dir(), ChunkSize::MAX, how).unwrap()
}

fn add(spool: &mut Spool, data: &[u8]) -> ContentId {
    let mut writer = spool.write();
    writer.data(data).unwrap();
    writer.finish().unwrap()
}

#[test]
fn equal_contents_are_stored_once() {
    let mut spool = spool();
    let first = add(&mut spool, b"one");
    let other = add(&mut spool, b"other");
    assert_eq!(add(&mut spool, b"one"), first);
    assert_ne!(other, first);
    assert_eq!((spool.len_bytes(), spool.end_bytes), (8, 8));
    let mut back = vec![0; 5];
    spool.read(&mut back, spool.content(other).stored[0].at).unwrap();
    assert_eq!(back, b"other");
}

#[test]
fn equal_pieces_of_large_contents_are_stored_once() {
    let mut spool = spool();
    let piece = |fill: u8| vec![fill; PIECE_BYTES];
    let first = add(&mut spool, &[piece(1), piece(2), piece(1), vec![3; 10]].concat());
    let second = add(&mut spool, &[piece(2), piece(4), vec![3; 10]].concat());
    // What was not finished is no content.
    spool.write().data(&[piece(5), piece(5)].concat()).unwrap();
    let third = add(&mut spool, &[piece(6), piece(5)].concat());
    spool.settle().unwrap();
    let chunks = |id| {
        let of = |piece: &StoredPiece| match piece.at {
            PieceAt::Chunk(number) => spool.chunk(number).unwrap(),
            PieceAt::Raw { .. } => panic!("{piece:?}"),
        };
        spool.content(id).stored.iter().map(of).collect::<Vec<_>>()
    };
    let (first, second, of_third) = (chunks(first), chunks(second), chunks(third));
    assert_eq!((first[0], first[1], first[3]), (first[2], second[0], second[2]));
    assert_eq!(spool.by_id.len(), 6);
    assert_eq!(spool.end_bytes, spool.by_id.values().map(|chunk| chunk.len_bytes as u64).sum::<u64>());
    assert!(of_third[0] != of_third[1]);
    let mut back = piece(0);
    spool.read(&mut back, spool.content(third).stored[1].at).unwrap();
    assert_eq!(back, piece(5));
}

#[test]
fn zeros_are_holes_however_they_come() {
    let mut spool = spool();
    let written = add(&mut spool, &vec![0; 3 * PIECE_BYTES]);
    let mut writer = spool.write();
    writer.zeros(3 * CHUNK_BYTES).unwrap();
    let zeros = writer.finish().unwrap();
    for id in [written, zeros] {
        let content = spool.content(id);
        assert!(content.has_holes() && content.stored.is_empty() && content.size_bytes == 3 * CHUNK_BYTES);
    }
    assert_eq!(spool.len_bytes(), 0);

    let mut writer = spool.write();
    writer.zeros(2 * CHUNK_BYTES + 5).unwrap();
    writer.data(b"x").unwrap();
    writer.zeros(CHUNK_BYTES).unwrap();
    let id = writer.finish().unwrap();
    assert_eq!(spool.content(id).size_bytes, 3 * CHUNK_BYTES + 6);
    let at = PieceAt::Chunk(ChunkNumber(0));
    assert_eq!(spool.content(id).stored, [StoredPiece { piece: 2, at }]);
    spool.settle().unwrap();
    let mut back = vec![0; PIECE_BYTES];
    spool.read(&mut back, at).unwrap();
    assert_eq!(back.iter().position(|byte| *byte == b'x'), Some(5));
}

#[test]
fn pieces_are_numbered_by_their_place_however_they_are_written() {
    let mut spool = spool();
    for step in [1000, 100_000, 3 * PIECE_BYTES] {
        let mut writer = spool.write();
        writer.zeros(CHUNK_BYTES + 5).unwrap();
        for part in vec![7; 2 * PIECE_BYTES + 1].chunks(step) {
            writer.data(part).unwrap();
        }
        let id = writer.finish().unwrap();
        let content = spool.content(id);
        let pieces: Vec<u32> = content.stored.iter().map(|piece| piece.piece).collect();
        assert_eq!((pieces, content.piece_len_bytes(3)), (vec![1, 2, 3], 6), "{step} bytes at once");
    }
}

#[test]
fn a_length_is_part_of_the_identity() {
    let mut spool = spool();
    let (one, two) = (add(&mut spool, &[0; 1]), add(&mut spool, &[0; 2]));
    assert_ne!(one, two);
    assert_ne!(add(&mut spool, b""), one);
}

#[test]
fn absurd_holes_are_refused_quickly() {
    let mut spool = spool();
    assert!(spool.write().zeros(u64::MAX).is_err());
    assert!(spool.write().zeros(2 << 40).is_err());
}

#[test]
fn what_waits_on_disk_is_what_will_be_stored() {
    let mut spool = spool();
    let text: Vec<u8> = (0..10 * PIECE_BYTES + 5).map(|at| b'a' + u8::try_from(at / 100 % 20).unwrap()).collect();
    let id = add(&mut spool, &text);
    let small = add(&mut spool, b"small");
    spool.settle().unwrap();
    assert_eq!(spool.len_bytes(), text.len() as u64 + 5);
    assert!(spool.end_bytes < spool.len_bytes() / 10, "{} bytes", spool.end_bytes);
    for (at, piece) in spool.content(id).stored.iter().enumerate() {
        let PieceAt::Chunk(number) = piece.at else { panic!("{piece:?}") };
        let chunk = spool.chunk(number).unwrap();
        let frame = spool.read_chunk(chunk).unwrap();
        assert_eq!(chunk.id.0, Sha256::of(&frame));
        let raw = zstd::bulk::decompress(&frame, PIECE_BYTES).unwrap();
        let want = &text[at * PIECE_BYTES..text.len().min((at + 1) * PIECE_BYTES)];
        assert!(
            raw.len().is_multiple_of(BLOCK_SIZE) && raw.starts_with(want) && raw[want.len()..].iter().all(|b| *b == 0)
        );
    }
    let mut back = [0; 5];
    spool.read(&mut back, spool.content(small).stored[0].at).unwrap();
    assert_eq!(&back, b"small");
}
