//! Finds sequential readers and says how far ahead of each to fetch.
//!
//! Files lie in path order and large files chunk after chunk, so a sequential reader shows as accesses to neighbouring
//! chunks of one blob. After [`NEIGHBOURS_MIN`] of them in a row a window of [`WINDOW_BYTES_MIN`] opens behind it, and each
//! further one doubles it, up to [`WINDOW_BYTES_MAX`]: a long reader soon fills the link. A jump, even one inside the
//! window, closes it: a program that faults its way through a shared library touches neighbours now and then, and what
//! is fetched beside its path is waste.

use crate::types::{BlobKey, ChunkKey, Now};

/// Readers followed at the same time; the one that was idle longest gives way. A start-up reads few files at once, and
/// the table is searched for every first access to a chunk.
pub const STREAMS_MAX: usize = 32;

/// Accesses to the next chunk in a row before a window opens. Cold `import numpy` at 100 Mbit/s and 2 x 20 ms, of an image
/// of 82 MB (`make demo`): without read-ahead 13.8 MB fetched, ready in 7.9 s; with 1 neighbour 24.6 MB, 6.7 s; with 2
/// 19.0 MB, 7.5 s; with 3 15.3 MB, 7.7 s. A file that is read whole does not notice one more.
const NEIGHBOURS_MIN: u32 = 2;

/// First window of a reader: one chunk of the largest size.
const WINDOW_BYTES_MIN: u64 = 256 << 10;

/// Last window of a reader: above the bandwidth-delay product of 1 Gbit/s at 20 ms (2.5 MB).
const WINDOW_BYTES_MAX: u64 = 4 << 20;

/// Chunks in a window, however small they are: bounds the work of one step.
const WINDOW_CHUNKS_MAX: u32 = 64;

/// Accesses this far behind the position are taken for requests that overtook each other, not for a new reader.
const REORDER_CHUNKS: u32 = 2;

#[derive(Debug)]
struct Stream {
    blob: BlobKey,
    /// Last chunk that was read.
    position: u32,
    /// First chunk that was not considered for read-ahead yet; always beyond `position`.
    next: u32,
    /// End of the window; `next..limit` is to be fetched.
    limit: u32,
    window_bytes: u64,
    /// Accesses in a row that went on where the one before had been.
    neighbours: u32,
    last_used: Now,
}

/// The bounded table of readers.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: Vec<Stream>,
    /// Whose turn it is, for a fair share of the window of bytes in flight.
    turn: usize,
}

impl Streams {
    /// Takes note of the first read of a chunk. `stored_lens` gives the length of each chunk of its blob.
    pub(crate) fn access(&mut self, chunk: ChunkKey, now: Now, stored_len: impl Fn(u32) -> Option<u32>) {
        let ours = self.streams.iter_mut().find(|stream| {
            stream.blob == chunk.blob
                && chunk.chunk.saturating_add(REORDER_CHUNKS) >= stream.position
                && chunk.chunk <= stream.next.max(stream.limit)
        });
        let Some(stream) = ours else {
            self.start(chunk, now);
            return;
        };
        stream.last_used = now;
        if chunk.chunk <= stream.position {
            return;
        }
        let is_neighbour = chunk.chunk <= stream.position + REORDER_CHUNKS;
        stream.neighbours = if is_neighbour { stream.neighbours.saturating_add(1) } else { 0 };
        stream.position = chunk.chunk;
        stream.next = stream.next.max(chunk.chunk + 1);
        if stream.neighbours < NEIGHBOURS_MIN {
            (stream.window_bytes, stream.limit) = (0, stream.next);
            return;
        }
        stream.window_bytes = (stream.window_bytes * 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        stream.limit = window_end(chunk.chunk + 1, stream.window_bytes, stored_len);
    }

    /// The next chunk to consider for read-ahead, of a blob that may be read ahead now; the readers take turns.
    pub(crate) fn next(&mut self, may: impl Fn(BlobKey) -> bool) -> Option<ChunkKey> {
        for _ in 0..self.streams.len() {
            self.turn = (self.turn + 1) % self.streams.len();
            let stream = &mut self.streams[self.turn];
            if stream.next < stream.limit && may(stream.blob) {
                stream.next += 1;
                return Some(ChunkKey { blob: stream.blob, chunk: stream.next - 1 });
            }
        }
        None
    }

    /// Whether any reader of such a blob has something left to consider.
    pub(crate) fn wants(&self, may: impl Fn(BlobKey) -> bool) -> bool {
        self.streams.iter().any(|stream| stream.next < stream.limit && may(stream.blob))
    }

    /// Gives back the last answer of [`Self::next`]: it did not fit now, and is to be considered again.
    pub(crate) fn put_back(&mut self) {
        self.streams[self.turn].next -= 1;
    }

    /// Forgets the readers of a blob.
    pub(crate) fn remove(&mut self, blob: BlobKey) {
        self.streams.retain(|stream| stream.blob != blob);
        self.turn = 0;
    }

    fn start(&mut self, chunk: ChunkKey, now: Now) {
        let next = chunk.chunk + 1;
        let (blob, position) = (chunk.blob, chunk.chunk);
        let stream = Stream { blob, position, next, limit: next, window_bytes: 0, neighbours: 0, last_used: now };
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(stream);
        } else if let Some(idle) = self.streams.iter_mut().min_by_key(|stream| stream.last_used) {
            *idle = stream;
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.streams.len()
    }
}

/// End of the window that starts at chunk `start`: the first chunk that no longer begins inside it.
fn window_end(start: u32, window_bytes: u64, stored_len: impl Fn(u32) -> Option<u32>) -> u32 {
    let mut left_bytes = window_bytes;
    let mut end = start;
    while left_bytes > 0 && end - start < WINDOW_CHUNKS_MAX {
        let Some(len) = stored_len(end) else { break };
        left_bytes = left_bytes.saturating_sub(u64::from(len));
        end += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOB: BlobKey = BlobKey(7);

    fn access(streams: &mut Streams, chunk: u32, now_ms: u64) {
        let len = |chunk: u32| (chunk < 1000).then_some(256 << 10);
        streams.access(ChunkKey { blob: BLOB, chunk }, Now::from_millis(now_ms), len);
    }

    fn drain(streams: &mut Streams) -> Vec<u32> {
        std::iter::from_fn(|| streams.next(|_| true)).map(|key| key.chunk).collect()
    }

    #[test]
    fn a_lone_access_opens_no_window() {
        let mut streams = Streams::default();
        access(&mut streams, 5, 0);
        access(&mut streams, 50, 1);
        assert_eq!(drain(&mut streams), []);
    }

    #[test]
    fn the_window_doubles_up_to_its_maximum() {
        let mut streams = Streams::default();
        access(&mut streams, 0, 0);
        access(&mut streams, 1, 1);
        assert_eq!(drain(&mut streams), []);
        access(&mut streams, 2, 2);
        assert_eq!(drain(&mut streams), [3]);
        access(&mut streams, 3, 3);
        assert_eq!(drain(&mut streams), [4, 5]);
        access(&mut streams, 4, 4);
        assert_eq!(drain(&mut streams), [6, 7, 8]);
        for chunk in 5..20 {
            access(&mut streams, chunk, 9);
        }
        assert_eq!(drain(&mut streams), (20..36).collect::<Vec<_>>(), "16 chunks of 256 KiB beyond chunk 19");
    }

    #[test]
    fn a_jump_closes_the_window() {
        let mut streams = Streams::default();
        for chunk in 0..6 {
            access(&mut streams, chunk, 0);
        }
        access(&mut streams, 6 + REORDER_CHUNKS, 1);
        assert_eq!(drain(&mut streams), []);
    }

    #[test]
    fn requests_that_overtake_each_other_stay_one_reader() {
        let mut streams = Streams::default();
        for chunk in [0, 1, 2, 4, 3, 5] {
            access(&mut streams, chunk, 0);
        }
        assert_eq!(streams.len(), 1);
    }

    #[test]
    fn the_end_of_the_blob_ends_the_window() {
        let mut streams = Streams::default();
        access(&mut streams, 996, 0);
        access(&mut streams, 997, 0);
        access(&mut streams, 998, 1);
        assert_eq!(drain(&mut streams), [999]);
        access(&mut streams, 999, 2);
        assert_eq!(drain(&mut streams), []);
    }

    #[test]
    fn the_table_is_bounded_and_the_idle_reader_gives_way() {
        let mut streams = Streams::default();
        for reader in 0..100 {
            access(&mut streams, reader * 10, u64::from(reader));
        }
        assert_eq!(streams.len(), STREAMS_MAX);
        access(&mut streams, 991, 101);
        access(&mut streams, 992, 101);
        assert_eq!(drain(&mut streams), [993], "the latest reader is still known");
    }

    #[test]
    fn readers_take_turns() {
        let mut streams = Streams::default();
        for chunk in [0, 1, 2, 100, 101, 102] {
            access(&mut streams, chunk, 0);
        }
        let order = drain(&mut streams);
        assert!(order[0].abs_diff(order[1]) > 50, "{order:?}");
    }
}
