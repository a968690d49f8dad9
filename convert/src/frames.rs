//! Chunks to zstd frames on all cores, in order, with bounded memory.
//!
//! Chunks go in at one end, frames come out at the other in the order of the chunks, workers compress in between. Whoever
//! puts in a chunk takes out the oldest frame as soon as a fixed number is under way, so no more than that are ever in
//! memory, however unevenly they compress. Each frame depends on its chunk and the level alone, so the number of threads
//! does not show in the output. A chunk may come as the frame that it was made earlier: then it is decompressed, because
//! whoever takes it out wants both.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};
use sha2::Digest as _;
use ublkimg_image::{CHUNK_BYTES, ChunkId, Sha256};

use crate::error::{Error, Result};
use crate::hashing::finish;

/// Chunks under way for each worker: one being compressed, one waiting before it, one behind it.
const UNDER_WAY_PER_WORKER: usize = 3;

/// How to compress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compress {
    /// zstd level.
    pub(crate) level: i32,
    /// Worker threads.
    pub(crate) threads: NonZeroUsize,
}

/// What goes in.
pub(crate) enum Chunk {
    /// To be compressed.
    Raw(Vec<u8>),
    /// Compressed already, at the same level.
    Stored { frame: Vec<u8>, id: ChunkId },
}

/// What comes out: a chunk, both ways.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) stored: Vec<u8>,
    pub(crate) raw: Vec<u8>,
    pub(crate) id: ChunkId,
}

/// The workers and what is under way. See the module.
#[derive(Debug)]
pub(crate) struct Frames {
    how: Compress,
    /// `None` only while dropping.
    jobs: Option<Sender<Job>>,
    /// Where the frames will arrive, oldest first.
    under_way: VecDeque<Receiver<Result<Frame>>>,
    workers: Vec<JoinHandle<()>>,
    /// Workers take jobs from here; kept to start more of them.
    take: Receiver<Job>,
}

struct Job {
    chunk: Chunk,
    reply: Sender<Result<Frame>>,
}

impl Frames {
    pub(crate) fn new(how: Compress) -> Self {
        let (jobs, take) = bounded(how.threads.get() * UNDER_WAY_PER_WORKER);
        Self { how, jobs: Some(jobs), under_way: VecDeque::new(), workers: Vec::new(), take }
    }

    /// Puts in a chunk; takes out the oldest frame if enough are under way.
    ///
    /// # Errors
    /// What became of that frame; `Io` when the system has no thread left.
    pub(crate) fn push(&mut self, chunk: Chunk) -> Result<Option<Frame>> {
        let full = self.under_way.len() == self.how.threads.get() * UNDER_WAY_PER_WORKER;
        let oldest = if full { self.pop()? } else { None };
        if self.workers.len() < self.how.threads.get() {
            let (level, take) = (self.how.level, self.take.clone());
            let worker = std::thread::Builder::new().name("compress".to_owned()).spawn(move || work(level, &take));
            self.workers.push(worker.map_err(|error| Error::io("starting a thread", error))?);
        }
        let (reply, receive) = bounded(1);
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(Job { chunk, reply }));
        sent.and_then(std::result::Result::ok).ok_or_else(stopped)?;
        self.under_way.push_back(receive);
        Ok(oldest)
    }

    /// Takes out the oldest frame, waiting for it; `None` when none is under way.
    ///
    /// # Errors
    /// What became of it.
    pub(crate) fn pop(&mut self) -> Result<Option<Frame>> {
        // A worker that panics drops its end.
        self.under_way.pop_front().map(|frame| frame.recv().map_err(|_| stopped())?).transpose()
    }
}

impl Drop for Frames {
    /// Lets the workers finish what they have.
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            // Its panic was reported where its frame was awaited.
            let _ = worker.join();
        }
    }
}

/// Makes frames of `count` chunks that `read` makes and hands them to `write` in order. Returns the digest of the raw
/// chunks one after another.
///
/// # Errors
/// The first error of `read` or `write`; nothing is written after it.
pub(crate) fn compress(
    how: Compress,
    count: usize,
    read: impl Fn(usize) -> Result<Chunk>,
    mut write: impl FnMut(&Frame) -> Result<()>,
) -> Result<Sha256> {
    let mut frames = Frames::new(how);
    let mut hasher = sha2::Sha256::new();
    let mut take = |frame: Option<Frame>| match frame {
        Some(frame) => {
            hasher.update(&frame.raw);
            write(&frame).map(|()| true)
        }
        None => Ok(false),
    };
    for number in 0..count {
        take(frames.push(read(number)?)?)?;
    }
    while take(frames.pop()?)? {}
    Ok(finish(hasher))
}

fn work(level: i32, jobs: &Receiver<Job>) {
    let mut compressor = zstd::bulk::Compressor::new(level);
    let mut decompressor = zstd::bulk::Decompressor::new();
    for Job { chunk, reply } in jobs {
        let frame = match (chunk, &mut compressor, &mut decompressor) {
            (Chunk::Raw(raw), Ok(compressor), _) => compressed(compressor, raw),
            (Chunk::Raw(_), Err(error), _) => Err(Error::unsupported(format!("zstd level {level}: {error}"))),
            (Chunk::Stored { frame, id }, _, Ok(decompressor)) => decompressed(decompressor, frame, id),
            (Chunk::Stored { .. }, _, Err(error)) => Err(Error::unsupported(format!("starting zstd: {error}"))),
        };
        // Whoever waited may have met an error and be gone.
        let _ = reply.send(frame);
    }
}

fn compressed(compressor: &mut zstd::bulk::Compressor<'_>, raw: Vec<u8>) -> Result<Frame> {
    let stored = compressor.compress(&raw).map_err(|error| Error::io("compressing", error))?;
    let id = ChunkId(Sha256::of(&stored));
    Ok(Frame { stored, raw, id })
}

fn decompressed(decompressor: &mut zstd::bulk::Decompressor<'_>, stored: Vec<u8>, id: ChunkId) -> Result<Frame> {
    #[expect(clippy::cast_possible_truncation, reason = "256 KiB")]
    let raw = decompressor.decompress(&stored, CHUNK_BYTES as usize);
    let raw = raw.map_err(|error| Error::io("decompressing what was put aside", error))?;
    Ok(Frame { stored, raw, id })
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
                |number| Ok(Chunk::Raw(chunk(number))),
                |frame| {
                    frames.push(frame.stored.clone());
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
        assert_eq!(compress(how(2), 0, |_| Ok(Chunk::Raw(Vec::new())), |_| Ok(())).unwrap(), Sha256::of(b""));
    }

    #[test]
    fn errors_of_both_ends_end_it() {
        let bad = || Error::new(ErrorKind::DiskFull, "full");
        let fail_read = |number| if number == 50 { Err(bad()) } else { Ok(Chunk::Raw(chunk(number))) };
        let error = compress(how(2), 100, fail_read, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DiskFull);
        let mut written = 0;
        let error = compress(
            how(2),
            1000,
            |number| Ok(Chunk::Raw(chunk(number))),
            |_| {
                written += 1;
                if written == 10 { Err(bad()) } else { Ok(()) }
            },
        );
        assert_eq!((error.unwrap_err().kind(), written), (ErrorKind::DiskFull, 10));
    }

    #[test]
    fn a_chunk_that_was_compressed_before_comes_out_the_same() {
        let run = |chunk: &dyn Fn(usize) -> Chunk| {
            let mut out = Vec::new();
            let digest = compress(
                how(3),
                40,
                |number| Ok(chunk(number)),
                |frame| {
                    out.push((frame.stored.clone(), frame.raw.clone(), frame.id));
                    Ok(())
                },
            );
            (digest.unwrap(), out)
        };
        let raw = run(&|number| Chunk::Raw(chunk(number)));
        let mixed = run(&|number| match raw.1[number].clone() {
            (frame, _, id) if number % 3 > 0 => Chunk::Stored { frame, id },
            (_, raw, _) => Chunk::Raw(raw),
        });
        assert_eq!(mixed, raw);
        let damaged = |_| Ok(Chunk::Stored { frame: b"no frame".to_vec(), id: raw.1[0].2 });
        assert_eq!(compress(how(2), 9, damaged, |_| Ok(())).unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn no_more_than_the_bound_is_under_way() {
        let mut frames = Frames::new(how(2));
        let mut out = 0;
        for number in 0..50 {
            out += usize::from(frames.push(Chunk::Raw(chunk(number))).unwrap().is_some());
            assert!(number + 1 - out <= 2 * UNDER_WAY_PER_WORKER);
        }
        while frames.pop().unwrap().is_some() {
            out += 1;
        }
        assert_eq!(out, 50);
    }
}
