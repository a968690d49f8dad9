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
use ublkimg_image::{BLOCK_SIZE, Bundle, Sha256};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::profile::{HotRef, MEDIA_TYPE_HOT, ProfileManifest, add_to_index, check_name};
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, Repository};

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

pub use fit::Dropped;

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
/// `Usage` for a location without a tag, or traces that cannot be one profile of this image; `NotFound`, `Unsupported`,
/// `VerificationFailed` for the image; `DiskFull`, `Io`; those of the registry. The tag has not moved then.
pub async fn optimize(
    location: &Location,
    traces: &[Trace],
    options: &OptimizeOptions,
    progress: Arc<dyn Progress>,
) -> Result<Optimized> {
    let tag = movable_tag(location)?;
    options.name.as_deref().map_or(Ok(()), check_name)?;
    let merged = match traces {
        [one] => one.clone(),
        several => merge(several, options.force)?,
    };
    let repository = Repository::open(location, &options.client).await?;
    let image = StoredImage::read(&repository, &options.platform).await?;
    let order_max = if options.order_only { 0 } else { HOT_BLOCKS_MAX };
    let fitted = fit(&merged, Sha256(image.digest.0), &image.bundle, order_max);
    if fitted.trace.entries.is_empty() {
        let message = format!("{location}: none of the {} traced blocks is of this image", merged.blocks());
        return Err(Error::new(ErrorKind::Usage, message));
    }
    let stored_trace = Bytes::from(store_trace(&fitted.trace)?);
    let bundle = Arc::new(image.bundle);
    let hot = match options.order_only {
        true => None,
        false => Some(make_hot(&repository, &bundle, fitted.order, options, &progress).await?),
    };
    let profile = ProfileManifest {
        subject: Descriptor::new(MEDIA_TYPE_MANIFEST, image.digest, image.manifest_size_bytes),
        command: Some(Digest(fitted.trace.command_digest().0)),
        name: options.name.clone(),
        trace: ProfileManifest::describe_trace(&stored_trace, hot.is_some()),
        hot: hot.as_ref().map(Hot::reference),
        annotations: BTreeMap::new(),
    };
    let publish = task(Phase::Publish);
    progress.start(&publish, None);
    let published = push(&repository, &profile, stored_trace.clone(), hot.as_ref(), options.is_default, tag).await?;
    progress.finish(&publish);
    Ok(Optimized {
        index: published.index,
        manifest: image.digest,
        profile: published.profile,
        existed: published.existed,
        runs: fitted.trace.header.runs,
        blocks: fitted.trace.blocks(),
        command: fitted.trace.header.command,
        dropped: fitted.dropped,
        trace_bytes: stored_trace.len() as u64,
        hot: hot.map(|hot| hot.summary),
    })
}

fn merge(traces: &[Trace], force: bool) -> Result<Trace> {
    trace::merge(traces, force).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))
}

/// The tag that is to point at the new index.
fn movable_tag(location: &Location) -> Result<&str> {
    let pinned = matches!(location, Location::Registry(reference) if reference.digest().is_some());
    let usage = |what| Error::new(ErrorKind::Usage, format!("{location}: {what}"));
    if pinned {
        return Err(usage("optimize moves the tag to an index that lists the profile; give the tag without a digest"));
    }
    location.tag().ok_or_else(|| usage("optimize moves a tag; give one"))
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

/// Where the profile is now.
struct Published {
    index: Digest,
    profile: Digest,
    existed: bool,
}

/// Pushes what the profile consists of, then the index that lists it; the tag last.
async fn push(
    repository: &Repository,
    profile: &ProfileManifest,
    stored_trace: Bytes,
    hot: Option<&Hot>,
    is_default: bool,
    tag: &str,
) -> Result<Published> {
    if let Some(Hot { blob, .. }) = hot {
        let source = BlobSource::File(blob.path());
        repository.push_blob(&Digest(blob.digest.0), blob.size_bytes, source, None).await?;
    }
    let (trace, config) = (&profile.trace, profile.config());
    repository.push_blob(&trace.digest, trace.size, BlobSource::Bytes(stored_trace), None).await?;
    let config_source = BlobSource::Bytes(profile.config_bytes());
    repository.push_blob(&config.digest, config.size, config_source, None).await?;
    let bytes = profile.to_bytes()?;
    let digest = repository.push_manifest(MEDIA_TYPE_MANIFEST, bytes.clone(), None).await?;
    // Others may have listed profiles of theirs while this one was made: theirs stay.
    let now = repository.resolve().await?;
    let index = add_to_index(&now.bytes, &bytes, is_default)?;
    if index == now.bytes {
        return Ok(Published { index: now.digest, profile: digest, existed: true });
    }
    let index = repository.push_manifest(MEDIA_TYPE_INDEX, index, Some(tag)).await?;
    Ok(Published { index, profile: digest, existed: false })
}

fn task(phase: Phase) -> Task {
    Task { phase, layer: None, layers: 0 }
}
