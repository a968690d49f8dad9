//! What every transport has to do.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ublkimg_driver::device::{Device, Prepared, QueueOptions, Transport};

use super::image::{CHUNK_BLOCKS, CHUNKS, Content, Driver, Origin};
use super::{BLOCK_LEN, open_direct, read_blocks};

/// Reads that wait while others must not.
const PENDING_MISSES: u32 = 64;
const MEASURED_READS: u32 = 300;
const ROUNDS: u32 = 4;

/// How the device of a scenario is served.
#[derive(Clone, Copy)]
pub(crate) struct How {
    pub(crate) transport: Transport,
    pub(crate) queue: QueueOptions,
}

impl From<Transport> for How {
    fn from(transport: Transport) -> Self {
        Self { transport, queue: QueueOptions::default() }
    }
}

/// An image and the device that serves it.
pub(crate) struct Served {
    pub(crate) origin: Origin,
    pub(crate) driver: Driver,
    pub(crate) run: PathBuf,
    device: Option<Device>,
    _directory: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start(how: How) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let origin = Origin::start();
        let driver = Driver::attach(&origin.reference(), &directory.path().join("store"));
        let run = directory.path().join("run");
        let device = Prepared::new(how.transport, driver.image.clone(), how.queue, &run).unwrap().start().unwrap();
        Self { origin, driver, run, device: Some(device), _directory: directory }
    }

    pub(crate) fn device(&self) -> &Device {
        self.device.as_ref().unwrap()
    }

    /// Reads one block of a chunk on a thread. Not neighbours, whose requests the kernel may merge.
    fn read_chunk(&self, chunk: u32) -> std::thread::JoinHandle<std::io::Result<()>> {
        let (path, content) = (self.device().path().to_owned(), self.origin.content());
        let block = self.origin.chunk_block(chunk) + CHUNK_BLOCKS / 2;
        std::thread::spawn(move || read_blocks(&open_direct(&path), block, 1).map(|bytes| content.check(block, &bytes)))
    }

    pub(crate) fn stop(&mut self) -> ublkimg_driver::Result<()> {
        self.device.take().unwrap().stop()
    }
}

/// After a failed assertion: readers of this very process must not wait for it for ever.
impl Drop for Served {
    fn drop(&mut self) {
        self.origin.release();
        if let Some(device) = self.device.take() {
            let _ = device.stop();
        }
    }
}

/// Compares the device with its source.
pub(crate) fn compare_device(path: &Path, content: &Content) {
    let blocks = content.blocks();
    assert_eq!(File::open(path).unwrap().seek(SeekFrom::End(0)).unwrap(), u64::from(blocks) * BLOCK_LEN as u64);
    let file = open_direct(path);
    for start in (0..blocks).step_by(96) {
        content.check(start, &read_blocks(&file, start, 96.min(blocks - start) as usize).unwrap());
    }
}

pub(crate) fn the_whole_device_equals_its_source(how: How) {
    let mut served = Served::start(how);
    compare_device(served.device().path(), &served.origin.content());
    served.stop().unwrap();
    assert_eq!(served.driver.image.statistics().errors, 0);
}

pub(crate) fn pending_misses_do_not_delay_hits(how: How) {
    let mut served = Served::start(how);
    let file = open_direct(served.device().path());
    served.read_chunk(0).join().unwrap().unwrap();
    let idle = latencies(&served, &file);
    served.origin.hold();
    let before = served.driver.waits();
    let readers: Vec<_> = (CHUNKS - PENDING_MISSES..CHUNKS).map(|chunk| served.read_chunk(chunk)).collect();
    served.driver.wait_for(before + u64::from(PENDING_MISSES));
    // Sending the requests takes the processor, of which a guest has one; waiting for the answers does not.
    std::thread::sleep(Duration::from_millis(300));
    let pending = latencies(&served, &file);
    println!(
        "hits: p50 {:?} p99 {:?}; with {PENDING_MISSES} misses p50 {:?} p99 {:?}",
        idle.0, idle.1, pending.0, pending.1
    );
    // Twice as long at most, and something for a busy machine.
    assert!(pending.1 <= idle.1 * 2 + Duration::from_millis(5), "hits wait for misses");
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    served.origin.release();
    for reader in readers {
        reader.join().unwrap().unwrap();
    }
    drop(file);
    served.stop().unwrap();
}

/// Median and 99th percentile of reads of blocks that are in the store, of the best round: others use the machine too,
/// but who waits for a miss does so in every round.
fn latencies(served: &Served, file: &File) -> (Duration, Duration) {
    let rounds = (0..ROUNDS).map(|_| latencies_once(served, file));
    rounds.min_by_key(|(_, percentile)| *percentile).unwrap()
}

fn latencies_once(served: &Served, file: &File) -> (Duration, Duration) {
    let mut all: Vec<_> = (0..MEASURED_READS)
        .map(|round| {
            let block = served.origin.chunk_block(0) + round % CHUNK_BLOCKS;
            let start = Instant::now();
            let bytes = read_blocks(file, block, 1).unwrap();
            let took = start.elapsed();
            served.origin.content().check(block, &bytes);
            took
        })
        .collect();
    all.sort_unstable();
    (all[all.len() / 2], all[all.len() * 99 / 100])
}

pub(crate) fn a_chunk_that_fails_gives_eio_and_its_neighbours_read(how: How) {
    const BAD: u32 = 50;
    let mut served = Served::start(how);
    served.origin.spoil(BAD);
    let (bad, next) = (served.origin.chunk_block(BAD), served.origin.chunk_block(BAD + 1));
    let file = open_direct(served.device().path());
    for block in [bad, next - 1] {
        assert_eq!(read_blocks(&file, block, 1).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    for block in [bad - 1, next] {
        served.origin.content().check(block, &read_blocks(&file, block, 1).unwrap());
    }
    assert!(read_blocks(&file, bad - 1, 2).is_err(), "a read of a good and a bad block");
    assert!(served.driver.image.statistics().verification_failures > 0);
    served.origin.mend();
    std::thread::sleep(ublkimg_scheduler::FAILURE_HOLD);
    served.origin.content().check(bad, &read_blocks(&file, bad, 1).unwrap());
    drop(file);
    served.stop().unwrap();
}

pub(crate) fn stopping_fails_what_waits(how: How) {
    let mut served = Served::start(how);
    served.origin.hold();
    let readers: Vec<_> = (1..9).map(|index| served.read_chunk(index * 10)).collect();
    served.driver.wait_for(8);
    let start = Instant::now();
    served.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "stopping took {:?}", start.elapsed());
    for reader in readers {
        assert!(reader.join().unwrap().is_err());
    }
}

pub(crate) fn many_readers_at_once(how: How) {
    let mut served = Served::start(how);
    served.origin.delay(1);
    let readers: Vec<_> = (0..8_u32)
        .map(|reader| {
            let (path, content) = (served.device().path().to_owned(), served.origin.content());
            std::thread::spawn(move || {
                // Through the page cache, so that read-ahead takes part.
                let file = File::open(&path).unwrap();
                let mut block = reader * 17;
                for _ in 0..300 {
                    block = (block * 1_103 + 12_345) % (content.blocks() - 40);
                    content.check(block, &read_blocks(&file, block, 1 + block as usize % 40).unwrap());
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    served.stop().unwrap();
}
