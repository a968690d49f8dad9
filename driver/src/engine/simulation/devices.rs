//! Devices: images that come and go, and those who read from them.
//!
//! A device has one queue, and each of those who read a tag of it. As in `device::ublk_queue` some reads are linked to their
//! answer: nobody looks at them again, so the queue has marked itself as reading until they are over.

use std::cell::RefCell;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use ublkimg_image::{BLOCK_SIZE, DeviceMap, TAIL_BLOCKS};
use ublkimg_scheduler::{BlobKind, ChunkKey, FillMode, ImageKey, PlanEntry};

use super::super::{Attachment, Control, NewBlob, NewImage, entries};
use super::{FAILURE_HOLD_MS, Life, READERS};
use crate::counters::ImageCounters;
use crate::device::completion::{CompletionPort, Outcome};
use crate::fetch::Source;
use crate::first_reads::DeviceRead;
use crate::image::{Piece, Plan, Readiness, ServedBlob, ServedImage, local};
use crate::store::{BlobFile, Reader as Mark};

/// How often a device plans a request in vain.
const PLANS_MAX: u32 = 16;

/// An image that is attached.
pub(super) struct Device {
    image: Arc<ServedImage>,
    files: Vec<Arc<BlobFile>>,
    chunks: Vec<ChunkKey>,
    key: ImageKey,
    port: Arc<CompletionPort>,
    mark: RefCell<Mark>,
}

impl Device {
    pub(super) fn files(&self) -> &[Arc<BlobFile>] {
        &self.files
    }

    /// Whether the queue was told to look at its news; that is heard once.
    fn is_told_to_look(&self) -> bool {
        rustix::io::read(self.port.event(), &mut [0; 8]).is_ok()
    }
}

/// What one of those who read is doing.
#[derive(Debug, Default)]
enum State {
    /// It has its bytes, or is yet to begin.
    #[default]
    Done,
    /// Its request is to be planned.
    Asked,
    Parked,
    /// The only piece of the plan is read, and that is the answer.
    Linked,
    /// So many pieces of the plan are read.
    Reading(usize),
}

/// Somebody who reads, one request at a time.
#[derive(Debug, Default)]
pub(super) struct Reader {
    state: State,
    /// What its queue heard of its request.
    news: Option<Outcome>,
    which: usize,
    /// The device that has its request.
    key: Option<ImageKey>,
    start_block: u32,
    len_blocks: u32,
    since_ms: u64,
    plans: u32,
    read: DeviceRead,
    plan: Plan,
    bytes: Vec<u8>,
    /// Requests that follow, of the whole device.
    left: Vec<(usize, u32)>,
}

impl Reader {
    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done) && self.left.is_empty()
    }

    pub(super) fn is_parked_or_done(&self) -> bool {
        match &self.state {
            State::Done => self.left.is_empty(),
            State::Parked => self.news.is_none(),
            State::Asked | State::Linked | State::Reading(_) => false,
        }
    }

    /// Its daemon is gone: the kernel has its request as it was.
    pub(super) fn ask_again(&mut self) {
        if !matches!(self.state, State::Done) {
            self.state = State::Asked;
        }
        (self.plans, self.read, self.plan, self.news) = Default::default();
        self.bytes.clear();
    }

    /// From now on it reads both devices, from their beginning to their end.
    pub(super) fn read_everything(&mut self) {
        self.left = (0..2).flat_map(|which| (0..16).map(move |part| (which, part))).collect();
    }
}

impl Life {
    /// An image comes, as `attach` has it.
    pub(super) fn attach(&self, which: usize) {
        self.note(|| format!("attach {which}"));
        let (counters, (attached, receiver)) = (Arc::<ImageCounters>::default(), watch::channel(()));
        let key = ImageKey(self.handle.next_image.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let trusts_plan = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let new = NewImage { link: "registry".to_owned(), attached, trusts_plan: Arc::clone(&trusts_plan) };
        let mut engine = self.engine.borrow_mut();
        let (reply, _answer) = oneshot::channel();
        engine.control(Control::AddImage { image: key, new, reply });
        let attachment =
            Attachment { engine: self.handle.clone(), image: key, trusts_plan, kept: Vec::new(), held: Vec::new() };
        let image = &self.host.images[which];
        let blobs = self.host.layers[which].map(|layer| &self.host.blobs[layer].1);
        let blob_blocks = blobs.map(|index| index.raw_len_blocks());
        let files = blobs.map(|index| self.store.blob(index.digest(), index.raw_len_blocks()).unwrap());
        let new_blob = |at: usize| NewBlob {
            kind: BlobKind::Layer,
            file: Arc::clone(&files[at]),
            source: Arc::new(Source {
                repository: self.host.repository.clone(),
                blob: image.manifest.layers[at].digest,
                index: Arc::clone(blobs[at]),
                read_deadline: Duration::from_secs(300),
                counters: Arc::clone(&counters),
                attached: receiver.clone(),
            }),
            entries: entries(&files[at], blobs[at]),
        };
        let new = [new_blob(0), new_blob(1)];
        let was_local = [0, 1].map(|at| local(&new[at].entries));
        let (reply, mut answer) = oneshot::channel();
        engine.control(Control::AddBlobs { image: key, blobs: new.into(), reply });
        drop(engine);
        let added = answer.try_recv().unwrap();
        let chunks = added
            .iter()
            .zip(blobs)
            .flat_map(|(added, index)| (0..index.len()).map(|chunk| ChunkKey { blob: added.key, chunk }));
        let chunks = chunks.collect();
        let served = was_local.into_iter().zip(&added).enumerate().map(|(at, (was_local, added))| {
            ServedBlob::new(added.key, Arc::clone(&files[at]), Arc::clone(blobs[at]), was_local)
        });
        let metadata_blocks = image.layer_starts[0];
        let metadata = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        metadata.write_all_at(&image.device[..metadata_blocks as usize * BLOCK_SIZE], 0).unwrap();
        let (metadata, blobs) = (Arc::new(metadata), served.collect());
        let map = DeviceMap::new(metadata_blocks, &blob_blocks).unwrap();
        let image = ServedImage::new(metadata, map, blob_blocks.len(), blobs, None, counters, Some(attachment));
        let port = CompletionPort::new(READERS).unwrap();
        rustix::fs::fcntl_setfl(port.event(), rustix::fs::OFlags::NONBLOCK).unwrap();
        let mark = RefCell::new(image.reader(move || super::end_linked_reads(which)).unwrap());
        let device = Device { image: Arc::new(image), files: files.into(), chunks, key, port, mark };
        self.devices.borrow_mut()[which] = Some(device);
    }

    /// An image goes, or comes again.
    pub(super) fn come_or_go(&self) {
        let which = usize::try_from(self.below(2)).unwrap();
        let gone = self.devices.borrow_mut()[which].take();
        match gone {
            // What its readers wait for fails, as nobody fetches it any more.
            Some(device) => {
                self.note_fault(|| format!("detach {which}"));
                // A device that is gone has no readers.
                let mut readers = self.readers.borrow_mut();
                let of_device = readers.iter_mut().filter(|reader| reader.key == Some(device.key));
                of_device.for_each(|reader| reader.state = State::Done);
                device.image.detach();
            }
            None => self.attach(which),
        }
    }

    /// A profile is followed, or what nobody asked for is fetched.
    pub(super) fn plan_or_fill(&self) {
        let devices = self.devices.borrow();
        let Some(device) = &devices[usize::try_from(self.below(2)).unwrap()] else { return };
        if self.happens(2) {
            let mode = [FillMode::Off, FillMode::Idle, FillMode::Full][usize::try_from(self.below(3)).unwrap()];
            return device.image.set_fill(mode);
        }
        let mut random = self.random.borrow_mut();
        let step = |_| PlanEntry {
            chunk: device.chunks[random.index(device.chunks.len())],
            due: Duration::from_millis(random.below(500)),
            confidence: u8::MAX,
        };
        self.handle.set_plan(device.key, (0..12).map(step).collect(), 1 << 20);
    }

    /// The disk cannot read what it has.
    pub(super) fn cannot_read(&self) {
        let devices = self.devices.borrow();
        let Some(device) = &devices[usize::try_from(self.below(2)).unwrap()] else { return };
        let (file, block) = (1 + u16::try_from(self.below(2)).unwrap(), self.below(60));
        self.note(|| format!("the disk cannot read block {block} of file {file}"));
        let _ = device.image.cannot_read(file, block * BLOCK_SIZE as u64, 8 * 4096);
    }

    /// One of those who read goes on.
    pub(super) fn read(&self) {
        // Somebody who reads reads nothing else meanwhile.
        let Ok(mut readers) = self.readers.try_borrow_mut() else { return };
        let tag = u16::try_from(self.below(READERS.into())).unwrap();
        let reader = &mut readers[usize::from(tag)];
        if matches!(reader.state, State::Done) {
            self.ask(reader);
        }
        let devices = self.devices.borrow();
        let Some(device) = &devices[reader.which] else {
            reader.state = State::Done;
            return;
        };
        match &reader.state {
            State::Done | State::Linked => {}
            State::Asked => self.plan(device, reader, tag),
            State::Parked => match reader.news.take() {
                Some(Ok(())) => reader.state = State::Asked,
                Some(Err(errno)) => self.fails(device, reader, errno),
                None => {}
            },
            State::Reading(piece) => {
                let piece = *piece;
                self.read_piece(device, reader, piece);
            }
        }
    }

    fn ask(&self, reader: &mut Reader) {
        if self.has_faults {
            reader.which = usize::try_from(self.below(2)).unwrap();
            let blocks = self.host.images[reader.which].device.len() / BLOCK_SIZE - TAIL_BLOCKS as usize;
            reader.start_block = u32::try_from(self.below(blocks as u64 + 8)).unwrap();
            reader.len_blocks = 1 + u32::try_from(self.below(40)).unwrap();
        } else {
            let Some((which, part)) = reader.left.pop() else { return };
            let blocks = u32::try_from(self.host.images[which].device.len() / BLOCK_SIZE).unwrap();
            let len_blocks = blocks.div_ceil(16);
            (reader.which, reader.start_block, reader.len_blocks) = (which, part * len_blocks, len_blocks);
        }
        (reader.plans, reader.since_ms) = (0, self.now_ms());
        if let Some(device) = &self.devices.borrow()[reader.which] {
            reader.read = device.image.begin(reader.start_block, reader.len_blocks);
            reader.state = State::Asked;
        }
    }

    fn plan(&self, device: &Device, reader: &mut Reader, tag: u16) {
        reader.plans += 1;
        let blocks = reader.start_block..reader.start_block + reader.len_blocks;
        assert!(reader.plans <= PLANS_MAX, "blocks {blocks:?} of {} are missing again and again", reader.which);
        reader.bytes.clear();
        reader.key = Some(device.key);
        device.mark.borrow_mut().begin();
        if device.image.plan(reader.start_block, reader.len_blocks, &mut reader.plan) == Readiness::Ready {
            let is_in_memory = |file: u16| usize::from(file) + 1 == device.image.files().len();
            reader.state = match reader.plan.pieces() {
                [Piece::File { file, .. }] if !is_in_memory(*file) && self.happens(2) => State::Linked,
                _ => State::Reading(0),
            };
            return;
        }
        self.note(|| format!("blocks {blocks:?} of {} miss {:?}", reader.which, reader.plan));
        (reader.state, reader.news) = (State::Parked, None);
        let waited = device.image.wait(&mut reader.read);
        device.image.demand(&reader.plan, waited, device.port.waiter(tag));
    }

    /// A queue that was told to looks at its news.
    pub(super) fn look_at_news(&self) {
        let Ok(mut readers) = self.readers.try_borrow_mut() else { return };
        for device in self.devices.borrow().iter().flatten().filter(|device| device.is_told_to_look()) {
            device.port.drain(|tag, outcome| {
                let reader = &mut readers[usize::from(tag)];
                let waits = matches!(reader.state, State::Parked) && reader.key == Some(device.key);
                assert!(waits && reader.news.is_none(), "news for tag {tag}, which does not wait");
                reader.news = Some(outcome);
            });
        }
    }

    /// The reads of a queue that are linked to their answers are over.
    pub(super) fn end_linked_reads(&self, which: usize) {
        let Ok(mut readers) = self.readers.try_borrow_mut() else { return };
        let Some(device) = &self.devices.borrow()[which] else { return };
        for reader in readers.iter_mut().filter(|reader| matches!(reader.state, State::Linked)) {
            if reader.key == Some(device.key) {
                self.read_next(device, reader, 0);
                self.answer(device, reader);
            }
        }
        device.mark.borrow_mut().end();
    }

    fn read_piece(&self, device: &Device, reader: &mut Reader, piece: usize) {
        self.read_next(device, reader, piece);
        if piece + 1 < reader.plan.pieces().len() {
            reader.state = State::Reading(piece + 1);
        } else if device.image.was_there(&reader.plan) {
            self.answer(device, reader);
        } else {
            // As after every eviction, however many there are.
            reader.plans = 0;
            reader.state = State::Asked;
        }
    }

    fn read_next(&self, device: &Device, reader: &mut Reader, piece: usize) {
        if let Some(piece) = reader.plan.pieces().get(piece) {
            let start = reader.bytes.len();
            match *piece {
                Piece::Zero { len_bytes } => reader.bytes.resize(start + len_bytes as usize, 0),
                Piece::File { file, offset_bytes, len_bytes } => {
                    reader.bytes.resize(start + len_bytes as usize, 0xEE);
                    let file = &device.image.files()[usize::from(file)];
                    file.read_exact_at(&mut reader.bytes[start..], offset_bytes).unwrap();
                }
            }
        }
    }

    fn answer(&self, device: &Device, reader: &mut Reader) {
        device.image.answered(&reader.read, Ok(reader.len_blocks * 4096));
        self.compare(reader);
        reader.state = State::Done;
    }

    fn compare(&self, reader: &Reader) {
        let device = &self.host.images[reader.which].device;
        let start = reader.start_block as usize * BLOCK_SIZE;
        for (at, block) in reader.bytes.chunks(BLOCK_SIZE).enumerate() {
            let offset = start + at * BLOCK_SIZE;
            let expected = device.get(offset..offset + BLOCK_SIZE).unwrap_or(&[0; BLOCK_SIZE]);
            assert!(block == expected, "block {} of {} has wrong bytes", offset / BLOCK_SIZE, reader.which);
        }
    }

    fn fails(&self, device: &Device, reader: &mut Reader, errno: i32) {
        let accounted = self.fault_ms.get() + FAILURE_HOLD_MS >= reader.since_ms && self.fault_ms.get() > 0;
        assert!(accounted, "a read fails with {errno}, and there was no fault");
        device.image.answered(&reader.read, Err(errno));
        reader.state = State::Done;
    }
}
