//! The profile that an image is started with: which one, and what of it may be used.
//!
//! A profile that the image's index lists is covered by what the user named, and so is one whose digest the user gave:
//! its hot blob is served. All others (a referrer, a file, what this host recorded) order the fetches of verified chunks
//! and do no more.
//!
//! Nothing here may keep an image from being attached, unless the user asked for this profile and no other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use ublkimg_image::trace::{self, Trace, TraceEntry};
use ublkimg_image::{Chunk, ChunkId, ChunkIndex, ChunkIndexBuilder, HotTable, Sha256};
use ublkimg_registry::Digest;
use ublkimg_registry::descriptor::Descriptor;
use ublkimg_registry::profile::{HotRef, ListedProfile, ProfileChoice, ProfileManifest, Trust};
use ublkimg_scheduler::{BlobKind, ChunkKey, PlanEntry};

use super::plan::{self, PlannedHot, PlannedLayer};
use super::{AttachOptions, Attaching, Named, blocking};
use crate::engine::{AddedBlob, NewBlob, entries};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{ServedBlob, ServedHot, local};
use crate::memory::{KEPT_BYTES_PER_TRACE_ENTRY, Share};
use crate::start_events::Mark;
use crate::store::{BlobFile, TRACE_BYTES_MAX};
use crate::trace_file;

/// Of a hot blob, before the metadata has had its turn: a connection is open then, and the link is known.
const FIRST_BYTES: u64 = 256 << 10;

/// A trace while it is decoded: stored, as encoded bytes, as entries.
const TRACE_DECODING_BYTES: u64 =
    TRACE_BYTES_MAX + (trace::TRACE_BYTES_MAX + trace::TRACE_ENTRIES_MAX * size_of::<TraceEntry>()) as u64;

/// Where the profile of a start comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProfileSource {
    /// One that is published with the image. [`ProfileChoice::Auto`] takes what this host recorded where none fits.
    Published(ProfileChoice),
    /// The stored trace in a file.
    File(PathBuf),
}

impl Default for ProfileSource {
    fn default() -> Self {
        Self::Published(ProfileChoice::Auto)
    }
}

/// The profile that an image is started with.
#[derive(Debug, Clone)]
pub struct LoadedProfile {
    /// The order of first reads.
    pub trace: Arc<Trace>,
    /// Whether packed blocks are served.
    pub has_hot_blob: bool,
    /// What a restart needs to know.
    pub kept: KeptProfile,
}

/// What a restart needs to know of a profile; the rest is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptProfile {
    /// Where it comes from, as a user would say it.
    pub source: String,
    /// Whether it is published with the image; otherwise it is a file or was recorded on this host.
    pub is_published: bool,
    /// Digest of the stored trace.
    pub trace: String,
    /// Digest of the profile's manifest, if its hot blob may be used.
    pub manifest: Option<String>,
}

/// A profile that was found.
pub(super) struct Profile {
    trace: Arc<Trace>,
    hot: Option<Hot>,
    kept: KeptProfile,
}

/// A hot blob that the engine knows.
struct Hot {
    file: Arc<BlobFile>,
    index: Arc<ChunkIndex>,
    added: AddedBlob,
    /// Whether each frame was in the store when attaching began.
    was_local: Box<[bool]>,
}

impl Attaching<'_> {
    /// The profile that the user wants.
    pub(super) async fn profile(&self, named: &Named, options: &AttachOptions) -> Result<Option<Profile>> {
        let choice = match &options.profile {
            ProfileSource::File(path) => return self.profile_of_file(path).await.map(Some),
            ProfileSource::Published(choice) => choice,
        };
        let (index, command) = (named.index.as_deref(), options.command.as_ref());
        let listed = self.repository.find_profile(index, &named.digest, choice, command).await;
        let listed = listed.map_err(|error| Error::registry(format!("find profile {choice}"), error))?;
        if *choice != ProfileChoice::Auto {
            return match &listed {
                Some(listed) => self.published(named.digest, listed).await.map(Some),
                None => Ok(None),
            };
        }
        let is_exact = |listed: &ListedProfile| options.command.is_some() && listed.command == options.command;
        if listed.as_ref().is_none_or(|listed| options.command.is_some() && !is_exact(listed)) {
            let recorded = self.recorded(named.digest, options.command).await;
            if recorded.is_some() {
                return Ok(recorded);
            }
        }
        let Some(listed) = listed else { return Ok(None) };
        let profile = self.published(named.digest, &listed).await;
        Ok(profile.map_err(|error| self.go_without(&error)).ok())
    }

    /// The profile that an image was started with before, from the store alone.
    pub(super) async fn kept_profile(&self, image: Digest, kept: &KeptProfile) -> Option<Profile> {
        let profile = async {
            let room = self.room_for_trace().await?;
            let bad = |error| Error::caused(ErrorKind::Corrupt, "a profile's digest", error);
            let gone = |digest: Digest| Error::new(ErrorKind::NotFound, format!("{digest} is not in the store"));
            let digest: Digest = kept.trace.parse().map_err(bad)?;
            let trace = decode(self.stored(digest).await?.ok_or_else(|| gone(digest))?, room).await?;
            let mut hot = None;
            if let Some(manifest) = &kept.manifest {
                let digest: Digest = manifest.parse().map_err(bad)?;
                let manifest = parse(digest, image, &self.stored(digest).await?.ok_or_else(|| gone(digest))?)?;
                if let Some(of_manifest) = &manifest.hot {
                    hot = self.add_hot(of_manifest).await?;
                }
            }
            Ok(Profile { trace, hot, kept: kept.clone() })
        };
        profile.await.map_err(|error| self.go_without(&error)).ok()
    }

    fn go_without(&self, error: &Error) {
        tracing::warn!("{}: starting without a profile: {}", self.location, error.chain());
    }

    /// A profile of the image's index: its hot blob is on its way when this returns, whether its trace is here or not.
    async fn published(&self, image: Digest, listed: &ListedProfile) -> Result<Profile> {
        let digest = listed.descriptor.digest;
        let bytes = self.profile_manifest(&listed.descriptor).await?;
        let manifest = parse(digest, image, &bytes)?;
        // With the trace here already, what the layers have is known in a moment: no byte is fetched in vain.
        let early = self.stored(manifest.trace.digest).await?.is_none();
        let hot = match &manifest.hot {
            Some(hot) if listed.trust == Trust::Bytes => self.add_hot(hot).await?,
            _ => None,
        };
        let name = listed.name.clone().unwrap_or_else(|| digest.to_string());
        let kept = KeptProfile {
            source: name,
            is_published: true,
            trace: manifest.trace.digest.to_string(),
            manifest: hot.as_ref().map(|_| digest.to_string()),
        };
        let streamed = async {
            if let (Some(hot), true) = (&hot, early) {
                self.stream(hot, FIRST_BYTES);
                self.turn.wait().await;
                self.stream(hot, u64::MAX);
            }
            Ok(())
        };
        let kept_manifest = self.keep_if_new(digest, bytes);
        let ((), trace, ()) = tokio::try_join!(streamed, self.published_trace(&manifest.trace), kept_manifest)?;
        Ok(Profile { trace, hot, kept })
    }

    async fn profile_manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        let bad = |error| Error::registry(format!("profile {}", descriptor.digest), error);
        if let Some(inside) = descriptor.inline().map_err(bad)? {
            return Ok(inside);
        }
        match self.stored(descriptor.digest).await? {
            Some(manifest) => Ok(manifest),
            None => self.fetch_manifest(descriptor.digest).await,
        }
    }

    async fn published_trace(&self, descriptor: &Descriptor) -> Result<Arc<Trace>> {
        let bad = |error| Error::registry(format!("trace {}", descriptor.digest), error);
        // While it comes; what it is decoded to is another matter, and takes no time.
        let _arriving = self.store.memory().stored.take(descriptor.size).await?;
        let stored = match descriptor.inline().map_err(bad)? {
            Some(inside) => {
                self.keep_if_new(descriptor.digest, inside.clone()).await?;
                inside
            }
            // The manifest's parser bounds the size.
            None => self.blob("trace", descriptor.digest, descriptor.size, |_, _, _| {}).await?,
        };
        decode(stored, self.room_for_trace().await?).await
    }

    /// Memory for a trace that is decoded.
    async fn room_for_trace(&self) -> Result<Share> {
        self.store.memory().raw.take(TRACE_DECODING_BYTES).await
    }

    /// What this host recorded of the image and the command. Trouble with it is logged: it is a hint.
    async fn recorded(&self, image: Digest, command: Option<Digest>) -> Option<Profile> {
        let store = Arc::clone(self.store);
        // A command that is not known is recorded as the empty one.
        let command = command.unwrap_or_else(|| Digest::of(b""));
        let profile = async {
            let room = self.room_for_trace().await?;
            let stored = blocking(move || store.host_trace(Sha256(image.0), Sha256(command.0))).await?;
            let Some(stored) = stored else { return Ok(None) };
            self.order_only(stored.into(), "recorded on this host".to_owned(), room).await.map(Some)
        };
        profile.await.map_err(|error| self.go_without(&error)).ok().flatten()
    }

    async fn profile_of_file(&self, path: &Path) -> Result<Profile> {
        let (of_blocking, room) = (path.to_owned(), self.room_for_trace().await?);
        let stored = blocking(move || {
            let doing = |error| Error::path("read", &of_blocking, error);
            if std::fs::metadata(&of_blocking).map_err(doing)?.len() > TRACE_BYTES_MAX {
                let what = format!("{} is too long for a trace", of_blocking.display());
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            std::fs::read(&of_blocking).map_err(doing)
        });
        self.order_only(stored.await?.into(), path.display().to_string(), room).await
    }

    async fn order_only(&self, stored: Bytes, source: String, room: Share) -> Result<Profile> {
        let digest = Digest::of(&stored);
        let trace =
            decode(stored.clone(), room).await.map_err(|error| Error::caused(error.kind(), source.clone(), error))?;
        self.keep_if_new(digest, stored).await?;
        let kept = KeptProfile { source, is_published: false, trace: digest.to_string(), manifest: None };
        Ok(Profile { trace, hot: None, kept })
    }

    /// Makes a hot blob known to the engine.
    async fn add_hot(&self, hot: &HotRef) -> Result<Option<Hot>> {
        let (store, encoded) = (Arc::clone(self.store), hot.table.clone());
        let opened = blocking(move || {
            let index = frames(&encoded)?;
            let file = store.blob(Sha256::of(&encoded), index.raw_len_blocks())?;
            let entries = entries(&file, &index);
            Ok((file, Arc::new(index), entries))
        });
        let (file, index, entries) = opened.await?;
        if index.section_offset_bytes() != hot.blob.size {
            let (digest, size, table) = (hot.blob.digest, hot.blob.size, index.section_offset_bytes());
            let what = format!("hot blob {digest} has {size} bytes, its table {table}");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        if index.is_empty() {
            return Ok(None);
        }
        let was_local = local(&entries);
        let (kind, source) = (BlobKind::Hot, self.source(hot.blob.digest, &index));
        let new = NewBlob { kind, file: Arc::clone(&file), source, entries };
        let (engine, image) = (&self.attachment.engine, self.attachment.image);
        let stopped = || Error::new(ErrorKind::Internal, "the engine has stopped");
        let added = engine.add_blobs(image, vec![new]).await?.pop().ok_or_else(stopped)?;
        Ok(Some(Hot { file, index, added, was_local }))
    }

    /// The profile, if there is memory for what an attached image keeps of it.
    pub(super) fn with_room(&mut self, profile: Profile) -> Option<Profile> {
        let bytes = profile.trace.entries.len() as u64 * KEPT_BYTES_PER_TRACE_ENTRY;
        match self.store.memory().kept.try_take(bytes) {
            Some(share) => self.attachment.keep(share),
            None => {
                let what = format!("no memory is left for {bytes} bytes of it");
                self.go_without(&Error::new(ErrorKind::Busy, what));
                return None;
            }
        }
        Some(profile)
    }

    /// What it names is fetched from now on.
    fn profile_is_known(&self) {
        if self.counters.events.fetching_begins() {
            self.counters.events.mark(Mark::Profile);
        }
    }

    /// Has the engine fetch a hot blob front to back, which is good enough until the trace is here: the frames that end
    /// before `end_bytes`, and at least the first.
    fn stream(&self, hot: &Hot, end_bytes: u64) {
        let step = |frame: Chunk| PlanEntry {
            chunk: ChunkKey { blob: hot.added.key, chunk: frame.index },
            due: std::time::Duration::ZERO,
            confidence: u8::MAX,
        };
        let frames = hot.index.iter().take_while(|frame| frame.index == 0 || frame.stored.end <= end_bytes);
        self.profile_is_known();
        self.attachment.engine.set_plan(self.attachment.image, frames.map(step).collect(), plan::CAP_BYTES_MIN);
    }

    /// Has the engine follow a profile, now that the layers are known.
    pub(super) async fn follow(
        &self,
        profile: Profile,
        layers: &[PlannedLayer],
        image_bytes: u64,
    ) -> Result<(Option<ServedHot>, LoadedProfile)> {
        let Profile { trace, hot, mut kept } = profile;
        let hot = hot.and_then(|hot| match plan::hot_map(&trace, layers, hot.index.raw_len_blocks()) {
            Some(map) => Some((hot, map)),
            None => {
                tracing::warn!("{}: the hot blob of profile {} is of another image", self.location, kept.source);
                kept.manifest = None;
                None
            }
        });
        let planned = hot.as_ref().map(|(hot, _)| PlannedHot { key: hot.added.key, index: &hot.index });
        let steps = plan::steps(&trace, layers, planned);
        self.profile_is_known();
        self.attachment.engine.set_plan(self.attachment.image, steps, plan::byte_cap(image_bytes));
        let served = hot.map(|(hot, map)| {
            let blob = ServedBlob::new(hot.added.key, hot.file, hot.index, hot.was_local);
            ServedHot::new(blob, map, hot.added.withdrawn)
        });
        let loaded = LoadedProfile { trace, has_hot_blob: served.is_some(), kept };
        Ok((served, loaded))
    }
}

/// A profile's manifest, which must be for this image.
fn parse(digest: Digest, image: Digest, bytes: &[u8]) -> Result<ProfileManifest> {
    let manifest = ProfileManifest::parse(bytes);
    let manifest = manifest.map_err(|error| Error::registry(format!("profile {digest}"), error))?;
    if manifest.subject.digest != image {
        let what = format!("profile {digest} is for {}, not for {image}", manifest.subject.digest);
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    Ok(manifest)
}

/// A stored trace, decoded where it may take its time; `room` is given back then.
async fn decode(stored: Bytes, room: Share) -> Result<Arc<Trace>> {
    let trace = blocking(move || trace_file::from_stored(&stored).map(Arc::new)).await;
    drop(room);
    trace
}

/// The frames of a hot table as an index: a frame is a chunk whose raw blocks are numbered by rank.
fn frames(table: &[u8]) -> Result<ChunkIndex> {
    let bad = |error| Error::caused(ErrorKind::Corrupt, "the table of a hot blob", error);
    let table = HotTable::decode(table).map_err(bad)?;
    let mut index = ChunkIndexBuilder::new(0);
    for frame in &table.frames {
        let raw_len_bytes = u64::from(frame.blocks) * ublkimg_image::BLOCK_SIZE as u64;
        index.push(u64::from(frame.stored_len_bytes), raw_len_bytes, ChunkId(frame.digest)).map_err(bad)?;
    }
    Ok(index.finish())
}
