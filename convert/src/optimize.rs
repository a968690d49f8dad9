//! From recorded starts to a profile: the trace and, packed in its order, the blocks that it names.
//!
//! ```text
//! traces ─► merge ─► fit to the image ─► blocks in first-use order ─► frames of 64 ─► hot blob ─┐
//!                          └─► trace ───────────────────────────────────────────────────────────┴─► profile ─► index
//! ```
//! Of the layers only the chunks that hold traced blocks are read; no layer is written. What is pushed is the trace, the
//! hot blob, the manifest that binds them, and an index that lists it beside the image's; the tag moves last. The same
//! image, traces and settings give the same bytes.

mod blocks;
mod fit;
mod pack;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use ublkimg_image::hot::{HOT_FRAME_BLOCKS_MAX, HOT_FRAMES_MAX};
use ublkimg_image::trace::{self, Trace};
use ublkimg_image::{BLOCK_SIZE, Bundle};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::profile::{HotRef, MEDIA_TYPE_HOT, ProfileManifest, check_name};
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, NewProfile, Repository};

use self::blocks::{BlockAddress, OrderedBlocks, read_blocks};
use self::fit::fit;
use self::pack::pack;
use crate::background;
use crate::blob::{Blob, from_image};
use crate::error::{Error, ErrorKind, Result};
use crate::frames::Compress;
use crate::progress::{Phase, Progress, Task};
use crate::stored_image::StoredImage;
use crate::trace_file::store_trace;

pub use fit::{Dropped, fit_trace};

/// Most blocks of a hot blob, as many as a table can vouch for: 4 GiB, ten times the largest start that was measured.
/// Blocks behind them are followed by their chunks.
const HOT_BLOCKS_MAX: usize = HOT_FRAMES_MAX * HOT_FRAME_BLOCKS_MAX as usize;

/// How to make a profile.
#[derive(Clone, Debug)]
pub struct OptimizeOptions {
    /// How to talk to registries.
    pub client: ClientOptions,
    /// Which image of a multi-platform index.
    pub platform: Platform,
    /// Directory for temporary files without names; needs room for the traced blocks, raw and packed.
    pub tmpdir: PathBuf,
    /// zstd level of the hot blob, 1 to 22.
    pub level: i32,
    /// Threads that compress. Does not change the output.
    pub threads: NonZeroUsize,
    /// A name to choose the profile by.
    pub name: Option<String>,
    /// Whether the profile is used for commands that have none of their own.
    pub is_default: bool,
    /// Leave the hot blob out: the trace gives the order, layers give the bytes.
    pub order_only: bool,
    /// Merge traces of different commands too.
    pub force: bool,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Optimized {
    /// Digest of the index that lists image and profile; the tag points at it.
    pub index: Digest,
    /// Digest of the image manifest.
    pub manifest: Digest,
    /// Digest of the profile manifest.
    pub profile: Digest,
    /// The index listed this very profile already.
    pub existed: bool,
    /// The command that the traces are of.
    pub command: Vec<String>,
    /// Starts that the traces were recorded from.
    pub runs: u32,
    /// Blocks in the trace.
    pub blocks: u64,
    /// Blocks that the traces name and the profile does not.
    pub dropped: Dropped,
    /// Length of the trace as it is stored, in bytes.
    pub trace_bytes: u64,
    /// The hot blob; `None` without one.
    pub hot: Option<HotSummary>,
}

/// A hot blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotSummary {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// Blocks in it: the first ones of the trace.
    pub blocks: u64,
    /// Number of frames.
    pub frames: usize,
    /// Chunks that were read to make it.
    pub chunks_read: u64,
    /// Bytes of these chunks as they are stored.
    pub chunk_bytes_read: u64,
}

/// Makes a profile of `traces` for the image at `location`, pushes it and lists it in the image's index.
///
/// # Errors
/// `Usage` for a location without a tag, or traces that cannot be one profile of this image; `NotFound`, `NotOurs`,
/// `VerificationFailed` for the image; `DiskFull`, `Io`; those of the registry. The tag has not moved then.
pub async fn optimize(
    location: &Location,
    traces: &[Trace],
    options: &OptimizeOptions,
    progress: Arc<dyn Progress>,
) -> Result<Optimized> {
    check_tag(location)?;
    options.name.as_deref().map_or(Ok(()), check_name)?;
    let merged = match traces {
        [one] => one.clone(),
        several => merge(several, options.force)?,
    };
    let repository = Repository::open(location, &options.client).await?;
    let image = StoredImage::read(&repository, &options.platform).await?;
    let order_max = if options.order_only { 0 } else { HOT_BLOCKS_MAX };
    let fitted = fit(&merged, &image, order_max).map_err(|error| error.within(location))?;
    let stored_trace = Bytes::from(store_trace(&fitted.trace)?);
    let bundle = Arc::new(image.bundle);
    let hot = match options.order_only {
        true => None,
        false => Some(make_hot(&repository, &bundle, fitted.order, options, &progress).await?),
    };
    let manifest = ProfileManifest {
        subject: Descriptor::new(MEDIA_TYPE_MANIFEST, image.digest, image.manifest_size_bytes),
        command: Some(Digest(fitted.trace.command_digest().0)),
        name: options.name.clone(),
        trace: ProfileManifest::describe_trace(&stored_trace, hot.is_some()),
        hot: hot.as_ref().map(Hot::reference),
        annotations: BTreeMap::new(),
    };
    let trace_bytes = stored_trace.len() as u64;
    let source = hot.as_ref().map(|hot| BlobSource::File(hot.blob.path()));
    let publish = task(Phase::Publish);
    progress.start(&publish, None);
    let profile = NewProfile { manifest, trace: stored_trace, hot: source };
    let pushed = repository.push_profile(&profile, options.is_default).await?;
    progress.finish(&publish);
    Ok(Optimized {
        index: pushed.index,
        manifest: image.digest,
        profile: pushed.manifest,
        existed: pushed.index == image.resolved.digest,
        runs: fitted.trace.header.runs,
        blocks: fitted.trace.blocks(),
        command: fitted.trace.header.command,
        dropped: fitted.dropped,
        trace_bytes,
        hot: hot.map(|hot| hot.summary),
    })
}

fn merge(traces: &[Trace], force: bool) -> Result<Trace> {
    trace::merge(traces, force).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))
}

/// Refuses early what has no tag that can be moved.
fn check_tag(location: &Location) -> Result<()> {
    let pinned = matches!(location, Location::Registry(reference) if reference.digest().is_some());
    if pinned || location.tag().is_none() {
        let message = format!("{location}: the tag is to name an index that lists the profile: give a tag, no digest");
        return Err(Error::new(ErrorKind::Usage, message));
    }
    Ok(())
}

/// A hot blob that is not pushed yet.
struct Hot {
    blob: Blob,
    table: Bytes,
    summary: HotSummary,
}

impl Hot {
    fn reference(&self) -> HotRef {
        HotRef {
            blob: Descriptor::new(MEDIA_TYPE_HOT, Digest(self.blob.digest.0), self.blob.size_bytes),
            table: self.table.clone(),
        }
    }
}

/// Reads the blocks and packs them.
async fn make_hot(
    repository: &Repository,
    bundle: &Arc<Bundle>,
    order: Vec<BlockAddress>,
    options: &OptimizeOptions,
    progress: &Arc<dyn Progress>,
) -> Result<Hot> {
    let reading = task(Phase::Read);
    let blocks = read_blocks(
        repository,
        bundle,
        &order,
        &options.tmpdir,
        |total_bytes| progress.start(&reading, Some(total_bytes)),
        |bytes| progress.advance(&reading, bytes),
    )
    .await?;
    progress.finish(&reading);
    let (options, progress) = (options.clone(), Arc::clone(progress));
    background::run(move || pack_hot(&blocks, order.len(), &options, &progress)).await?
}

/// The blocking part of [`make_hot`].
fn pack_hot(
    blocks: &OrderedBlocks,
    count: usize,
    options: &OptimizeOptions,
    progress: &Arc<dyn Progress>,
) -> Result<Hot> {
    let task = task(Phase::Compress);
    progress.start(&task, Some((count * BLOCK_SIZE) as u64));
    let how = Compress { level: options.level, threads: options.threads };
    let (blob, table) = pack(blocks, count, &options.tmpdir, how, |bytes| progress.advance(&task, bytes))?;
    progress.finish(&task);
    let summary = HotSummary {
        digest: Digest(blob.digest.0),
        size_bytes: blob.size_bytes,
        blocks: count as u64,
        frames: table.frames.len(),
        chunks_read: blocks.chunks,
        chunk_bytes_read: blocks.chunk_bytes,
    };
    Ok(Hot { blob, table: table.encode().map_err(from_image)?.into(), summary })
}

fn task(phase: Phase) -> Task {
    Task { phase, layer: None, layers: 0 }
}
