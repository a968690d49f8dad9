//! Chunks to zstd frames on all cores, in order, with bounded memory.
//!
//! One thread reads raw chunks, workers compress and hash them, and the caller's thread gets the frames in the order of
//! the chunks. A fixed number of permits goes round: reading a chunk takes one, handing its frame out returns it, so no
//! more than that many chunks are ever in memory, however unevenly they compress. Each frame depends on its chunk and
//! the level alone, so the number of threads does not show in the output.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use crossbeam::channel::{Receiver, Sender, bounded};
use sha2::Digest as _;
use ublkimg_image::{ChunkId, Sha256};

use crate::error::{Error, Result};
use crate::hashing::finish;

/// Chunks in memory for each worker: one being compressed, one waiting before it, one behind it.
const PERMITS_PER_WORKER: usize = 3;

/// How to compress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compress {
    /// zstd level.
    pub(crate) level: i32,
    /// Worker threads.
    pub(crate) threads: NonZeroUsize,
}

/// A compressed chunk.
pub(crate) struct Frame {
    pub(crate) stored: Vec<u8>,
    pub(crate) raw_len_bytes: u64,
    pub(crate) id: ChunkId,
}

/// Compresses `count` chunks that `read` makes and hands the frames to `write` in order. Returns the digest of the raw
/// chunks one after another.
///
/// # Errors
/// The first error of `read` or `write`; nothing is written after it.
pub(crate) fn compress(
    how: Compress,
    count: usize,
    read: impl Fn(usize) -> Result<Vec<u8>> + Send + Sync,
    mut write: impl FnMut(Frame) -> Result<()>,
) -> Result<Sha256> {
    let workers = how.threads.get().min(count.max(1));
    let permits = workers * PERMITS_PER_WORKER;
    let (permit_return, permit_take) = bounded::<()>(permits);
    let (raw_send, raw_receive) = bounded::<(usize, Vec<u8>)>(permits);
    let (frame_send, frame_receive) = bounded::<(usize, Result<Frame>)>(permits);
    for _ in 0..permits {
        permit_return.send(()).map_err(|_| stopped())?;
    }
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || read_chunks(count, &read, &permit_take, &raw_send));
        for _ in 0..workers {
            let (receive, send) = (raw_receive.clone(), frame_send.clone());
            scope.spawn(move || work(how.level, &receive, &send));
        }
        drop((raw_receive, frame_send));
        let written = write_frames(count, &frame_receive, &permit_return, &mut write);
        // A reader or worker that waits for this end must see that it is gone.
        drop((frame_receive, permit_return));
        let digest = reader.join().map_err(|_| stopped())?;
        match (written, digest) {
            (Err(Stop::Failed(error)), _) | (_, Err(Stop::Failed(error))) => Err(error),
            (Ok(()), Ok(digest)) => Ok(digest),
            _ => Err(stopped()),
        }
    })
}

/// Why one end of the pipeline stopped.
enum Stop {
    Failed(Error),
    /// The other end is gone, and knows why.
    CutOff,
}

fn read_chunks(
    count: usize,
    read: impl Fn(usize) -> Result<Vec<u8>>,
    permits: &Receiver<()>,
    send: &Sender<(usize, Vec<u8>)>,
) -> Result<Sha256, Stop> {
    let mut hasher = sha2::Sha256::new();
    for number in 0..count {
        permits.recv().map_err(|_| Stop::CutOff)?;
        let raw = read(number).map_err(Stop::Failed)?;
        hasher.update(&raw);
        send.send((number, raw)).map_err(|_| Stop::CutOff)?;
    }
    Ok(finish(hasher))
}

fn work(level: i32, receive: &Receiver<(usize, Vec<u8>)>, send: &Sender<(usize, Result<Frame>)>) {
    let mut compressor = zstd::bulk::Compressor::new(level);
    for (number, raw) in receive {
        let frame = match &mut compressor {
            Ok(compressor) => frame(compressor, &raw),
            Err(error) => Err(Error::unsupported(format!("zstd level {level}: {error}"))),
        };
        if send.send((number, frame)).is_err() {
            return;
        }
    }
}

fn frame(compressor: &mut zstd::bulk::Compressor<'_>, raw: &[u8]) -> Result<Frame> {
    let stored = compressor.compress(raw).map_err(|error| Error::io("compressing", error))?;
    let id = ChunkId(Sha256::of(&stored));
    Ok(Frame { stored, raw_len_bytes: raw.len() as u64, id })
}

fn write_frames(
    count: usize,
    receive: &Receiver<(usize, Result<Frame>)>,
    permits: &Sender<()>,
    write: &mut impl FnMut(Frame) -> Result<()>,
) -> Result<(), Stop> {
    let mut early: BTreeMap<usize, Frame> = BTreeMap::new();
    let mut next = 0;
    for (number, frame) in receive {
        early.insert(number, frame.map_err(Stop::Failed)?);
        while let Some(frame) = early.remove(&next) {
            write(frame).map_err(Stop::Failed)?;
            next += 1;
            // The reader may be done and gone.
            let _ = permits.send(());
        }
    }
    if next == count { Ok(()) } else { Err(Stop::CutOff) }
}

fn stopped() -> Error {
    Error::new(crate::ErrorKind::Io, "compression stopped early")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn how(threads: usize) -> Compress {
        Compress { level: 3, threads: NonZeroUsize::new(threads).unwrap() }
    }

    fn chunk(number: usize) -> Vec<u8> {
        (0..4096 * (1 + number % 7)).map(|byte| u8::try_from(byte / (number + 1) % 251).unwrap()).collect()
    }

    #[test]
    fn frames_come_in_order_and_do_not_depend_on_threads() {
        let run = |threads| {
            let mut frames = Vec::new();
            let digest = compress(
                how(threads),
                100,
                |number| Ok(chunk(number)),
                |frame| {
                    frames.push(frame.stored);
                    Ok(())
                },
            );
            (digest.unwrap(), frames)
        };
        let (digest, frames) = run(1);
        assert_eq!(run(4), (digest, frames.clone()));
        let raw: Vec<u8> = (0..100).flat_map(chunk).collect();
        assert_eq!(digest, Sha256::of(&raw));
        let decoded: Vec<u8> = frames.iter().flat_map(|frame| zstd::decode_all(frame.as_slice()).unwrap()).collect();
        assert_eq!(decoded, raw);
        assert_eq!(run(3).1.len(), 100);
    }

    #[test]
    fn no_chunks_at_all() {
        assert_eq!(compress(how(2), 0, |_| Ok(Vec::new()), |_| Ok(())).unwrap(), Sha256::of(b""));
    }

    #[test]
    fn errors_of_both_ends_end_it() {
        let bad = || Error::new(ErrorKind::DiskFull, "full");
        let fail_read = |number| if number == 50 { Err(bad()) } else { Ok(chunk(number)) };
        let error = compress(how(2), 100, fail_read, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DiskFull);
        let mut written = 0;
        let error = compress(
            how(2),
            1000,
            |number| Ok(chunk(number)),
            |_| {
                written += 1;
                if written == 10 { Err(bad()) } else { Ok(()) }
            },
        );
        assert_eq!((error.unwrap_err().kind(), written), (ErrorKind::DiskFull, 10));
    }
}
