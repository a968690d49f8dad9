//! From the name of an image to a [`ServedImage`]: everything before there is a device.
//!
//! By tag it takes three requests in sequence, whatever the number of layers: the index, the manifest, the metadata blob,
//! which brings the chunk indexes of all layer blobs along; by the manifest's digest it takes two, and none for what the
//! store has. Each thing is checked against what named it before it is used: the manifest against its digest, the
//! metadata blob against the manifest, each chunk index against the manifest, the device table against the indexes.
//!
//! Beside the image its profile is fetched ([`profile`]): its manifest with the image's, its trace with the metadata. Its
//! hot blob follows right behind the metadata ([`turn`]), before there is a device.
//!
//! All of it is kept in the store, so [`reopen`] needs no registry.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use ublkimg_image::{ChunkIndex, Sha256};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, choose};
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};
use ublkimg_scheduler::BlobKind;

use crate::counters::ImageCounters;
use crate::engine::{AddedBlob, Attachment, Engine, NewBlob};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::Source;
use crate::image::{ServedBlob, ServedImage, local};
use crate::memory::Share;
use crate::start_events::{FetchClass, Get, Mark};
use crate::store::{HeldObject, Store};
use crate::verity::VerityTable;

mod known;
pub(crate) mod mend;
mod plan;
mod prepare;
mod profile;
mod turn;

use plan::PlannedLayer;
use prepare::{CheckedImage, PreparedBlob};
use profile::Profile;
pub use profile::{KeptProfile, LoadedProfile, ProfileSource};
use turn::Turn;

/// How an image is attached.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// Which of the images that a tag names.
    pub platform: Platform,
    /// How to talk to the registry. Its `retry_deadline` is replaced by `attach_deadline`.
    pub client: ClientOptions,
    /// How long attaching may take.
    pub attach_deadline: Duration,
    /// How long a read waits for a registry that does not answer, before it fails with EIO.
    pub read_deadline: Duration,
    /// What the image is started with.
    pub profile: ProfileSource,
    /// Digest of the command that is about to run, if it is known: it chooses the profile.
    pub command: Option<Digest>,
}

impl Default for AttachOptions {
    /// The platform of this machine; 60 s to attach, 300 s for a read; the profile that fits.
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            client: ClientOptions::default(),
            attach_deadline: Duration::from_secs(60),
            read_deadline: Duration::from_secs(300),
            profile: ProfileSource::default(),
            command: None,
        }
    }
}

/// An attached image and what it is.
#[derive(Debug)]
pub struct LoadedImage {
    /// What a device serves.
    pub image: Arc<ServedImage>,
    /// Names the image for [`reopen`].
    pub manifest_digest: Digest,
    /// The manifest.
    pub manifest: ErofsManifest,
    /// What it is started with.
    pub profile: Option<LoadedProfile>,
    /// What the kernel needs to check it, if it has a tree.
    pub verity: Option<VerityTable>,
}

/// Attaches the image that `location` names now. Runs on any tokio runtime.
///
/// # Errors
/// `NotFound`, `Unauthorized`, `Unavailable` and `TimedOut` from the registry; `NotOurs` for an image of another format;
/// `Corrupt` when something is not what names it; `Busy` with too many images; those of the store.
pub async fn attach(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    options: &AttachOptions,
) -> Result<LoadedImage> {
    let known = known::known(store, location).await;
    let attached = async {
        let repository = open(location, options).await?;
        let attaching = Attaching::new(store, engine, location, repository, options).await?;
        let named = match &known {
            None => attaching.resolve(&options.platform).await?,
            Some(known) => match attaching.resolve_soon(&options.platform).await {
                Err(why) if why.kind() == ErrorKind::Unavailable => {
                    return known::attach_known(store, engine, location, known, options, why).await;
                }
                named => named?,
            },
        };
        let image = async {
            let (bytes, manifest) = attaching.manifest(&named).await?;
            // The disk takes as long as the registry: neither waits for the other.
            let kept = attaching.keep_manifest(&named, bytes);
            let ((), checked) = tokio::try_join!(kept, attaching.checked(&manifest))?;
            Ok((manifest, checked))
        };
        let profile = attaching.profile(&named, options);
        let ((manifest, checked), profile) = tokio::try_join!(image, profile)?;
        let loaded = attaching.serve(named.digest, manifest, checked, profile).await?;
        known::keep(store, location, known.as_ref(), &loaded).await;
        Ok(loaded)
    };
    let timed_out = || {
        let seconds = options.attach_deadline.as_secs();
        Error::new(ErrorKind::TimedOut, format!("attach {location}: not done after {seconds} s"))
    };
    let attached = tokio::time::timeout(options.attach_deadline, attached).await;
    attached.map_err(|_| timed_out())?.map_err(|error| about(location, error))
}

/// An image that was attached before, as far as it can be opened beside the process that owns the store.
#[derive(Debug)]
pub(crate) struct KnownImage {
    location: Location,
    repository: Repository,
    manifest_digest: Digest,
    manifest: ErofsManifest,
    checked: CheckedImage,
    held: Vec<HeldObject>,
}

impl KnownImage {
    /// Finds an image in the store, and checks it. `location` is where its chunks are fetched from, by way of `repository`.
    pub(crate) async fn open(
        store: &Arc<Store>,
        location: &Location,
        repository: Repository,
        manifest_digest: Digest,
    ) -> Result<Self> {
        let mut held = Vec::new();
        let mut object = async |digest: Digest| {
            let not_here = || Error::new(ErrorKind::NotFound, format!("{digest} is not in the store"));
            let (hold, bytes) = stored(store, digest).await?;
            held.push(hold);
            bytes.ok_or_else(not_here)
        };
        let manifest = parse(manifest_digest, &object(manifest_digest).await?)?;
        let share = store.memory().stored.take(manifest.metadata.size_bytes).await?;
        let blob = object(manifest.metadata.digest).await?;
        let checked = check(store, &manifest, blob, share).await?;
        Ok(Self { location: location.clone(), repository, manifest_digest, manifest, checked, held })
    }

    /// The digest of its manifest.
    pub(crate) fn manifest_digest(&self) -> Digest {
        self.manifest_digest
    }

    /// The rest of [`reopen`], by the owner of the store.
    pub(crate) async fn attach(
        self,
        store: &Arc<Store>,
        engine: &Engine,
        profile: Option<&KeptProfile>,
        options: &AttachOptions,
    ) -> Result<LoadedImage> {
        let mut attaching = Attaching::new(store, engine, &self.location, self.repository, options).await?;
        attaching.held.get_mut().extend(self.held);
        let profile = match profile {
            Some(kept) => attaching.kept_profile(self.manifest_digest, kept).await,
            None => None,
        };
        attaching.serve(self.manifest_digest, self.manifest, self.checked, profile).await
    }
}

/// Attaches an image that was attached before, without the registry; `location` is where its chunks are fetched from,
/// should some be missing. `profile` is what it was started with.
///
/// # Errors
/// `NotFound` when the store does not have the image; otherwise as [`attach`].
pub async fn reopen(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    manifest_digest: Digest,
    profile: Option<&KeptProfile>,
    options: &AttachOptions,
) -> Result<LoadedImage> {
    let repository = open(location, options).await?;
    let known = KnownImage::open(store, location, repository, manifest_digest).await?;
    known.attach(store, engine, profile, options).await
}

/// What `options` say of the registry.
fn client(options: &AttachOptions) -> ClientOptions {
    ClientOptions { retry_deadline: options.attach_deadline, ..options.client.clone() }
}

/// A repository for what is served already: what cannot be used now may be mended before it is needed.
pub(crate) fn open_later(location: &Location, options: &AttachOptions) -> Repository {
    Repository::open_later(location, &client(options))
}

/// A repository that can be used.
pub(crate) async fn open(location: &Location, options: &AttachOptions) -> Result<Repository> {
    let repository = Repository::open(location, &client(options)).await;
    repository.map_err(|error| Error::registry(format!("open {location}"), error))
}

/// What a location names.
struct Named {
    /// Of the image's manifest.
    digest: Digest,
    manifest: Option<Bytes>,
    /// The manifest is in the store.
    is_stored: bool,
    /// The index that named it; what is listed there is covered by what the user named.
    index: Option<Bytes>,
}

/// What attaching one image works with. The engine knows the image from the start, and forgets it if this is dropped.
struct Attaching<'a> {
    store: &'a Arc<Store>,
    location: &'a Location,
    repository: Repository,
    read_deadline: Duration,
    counters: Arc<ImageCounters>,
    attachment: Attachment,
    attached: watch::Receiver<()>,
    /// What was looked for in the store, or kept there.
    held: Mutex<Vec<HeldObject>>,
    /// The metadata has it first.
    turn: Turn,
}

impl<'a> Attaching<'a> {
    async fn new(
        store: &'a Arc<Store>,
        engine: &'a Engine,
        location: &'a Location,
        repository: Repository,
        options: &AttachOptions,
    ) -> Result<Self> {
        let (attached, receiver) = watch::channel(());
        let attachment = engine.handle().add_image(link_name(location, &options.client), attached).await?;
        Ok(Self {
            store,
            location,
            repository,
            read_deadline: options.read_deadline,
            counters: Arc::new(ImageCounters { image: location.to_string(), ..ImageCounters::default() }),
            attachment,
            attached: receiver,
            held: Mutex::default(),
            turn: Turn::new(),
        })
    }

    /// What the location names, if the registry answers soon.
    async fn resolve_soon(&self, platform: &Platform) -> Result<Named> {
        let silent = || {
            let text = format!("resolve {}: no answer within {} s", self.location, known::PATIENCE.as_secs());
            Error::new(ErrorKind::Unavailable, text)
        };
        tokio::time::timeout(known::PATIENCE, self.resolve(platform)).await.map_err(|_| silent())?
    }

    /// What the location names.
    async fn resolve(&self, platform: &Platform) -> Result<Named> {
        if let Location::Registry(reference) = self.location
            && let Some(digest) = reference.digest()
            && let Some(manifest) = self.stored(digest).await?
        {
            return Ok(Named { digest, manifest: Some(manifest), is_stored: true, index: None });
        }
        let what = || format!("resolve {}", self.location);
        let get = self.begin_get();
        let resolved = self.repository.resolve().await.map_err(|error| Error::registry(what(), error))?;
        self.end_get(get, resolved.bytes.len());
        let is_index = matches!(resolved.media_type.as_str(), MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_LIST);
        if !is_index {
            let (digest, manifest) = (resolved.digest, Some(resolved.bytes));
            return Ok(Named { digest, manifest, is_stored: false, index: None });
        }
        let chosen = choose(&resolved.bytes, platform).map_err(|error| bad_manifest(resolved.digest, error))?;
        let manifest = self.stored(chosen.digest).await?;
        Ok(Named { digest: chosen.digest, is_stored: manifest.is_some(), manifest, index: Some(resolved.bytes) })
    }

    /// The image's manifest, which must be ours.
    async fn manifest(&self, named: &Named) -> Result<(Bytes, ErofsManifest)> {
        let bytes = match &named.manifest {
            Some(bytes) => bytes.clone(),
            None => self.fetch_manifest(named.digest).await?,
        };
        let manifest = parse(named.digest, &bytes)?;
        self.counters.events.mark(Mark::Manifest);
        Ok((bytes, manifest))
    }

    async fn keep_manifest(&self, named: &Named, bytes: Bytes) -> Result<()> {
        if named.is_stored { Ok(()) } else { self.keep(named.digest, bytes).await }
    }

    async fn fetch_manifest(&self, digest: Digest) -> Result<Bytes> {
        let get = self.begin_get();
        let manifest = self.repository.manifest(&digest).await;
        let manifest = manifest.map_err(|error| Error::registry(format!("fetch manifest {digest}"), error))?;
        self.end_get(get, manifest.len());
        Ok(manifest)
    }

    /// The image of the metadata blob, which comes from the store or into it.
    async fn checked(&self, manifest: &ErofsManifest) -> Result<CheckedImage> {
        let (digest, len_bytes) = (manifest.metadata.digest, manifest.metadata.size_bytes);
        let share = self.store.memory().stored.take(len_bytes).await?;
        let arriving = |received_bytes: u64, receiving: Duration, round_trip: Duration| {
            self.turn.pass_if_near(received_bytes, len_bytes, receiving, round_trip);
        };
        let blob = self.blob("metadata blob", digest, len_bytes, arriving).await?;
        self.turn.pass();
        check(self.store, manifest, blob, share).await
    }

    /// A whole blob, from the store or into it; `what` it is. Whoever names it bounds its size. `arriving` is told how
    /// much of it is here, since when the answer has been arriving, and what time its first byte took.
    async fn blob(
        &self,
        what: &str,
        digest: Digest,
        size_bytes: u64,
        arriving: impl Fn(u64, Duration, Duration),
    ) -> Result<Bytes> {
        if let Some(blob) = self.stored(digest).await? {
            return Ok(blob);
        }
        let what = format!("fetch {what} {digest}");
        let fetched = self.fetch_blob(&self.repository, &what, digest, size_bytes, &arriving).await;
        let wrong = fetched.as_ref().err().filter(|error| error.kind() == ErrorKind::Corrupt);
        let blob = match wrong.and_then(|error| Some((error, self.repository.distrust_mirrors(&digest)?))) {
            Some((error, registry)) => {
                tracing::warn!("{}; the registry itself is asked", error.chain());
                self.fetch_blob(&registry, &what, digest, size_bytes, &arriving).await
            }
            None => fetched,
        }?;
        self.keep(digest, blob.clone()).await?;
        Ok(blob)
    }

    async fn fetch_blob(
        &self,
        repository: &Repository,
        what: &str,
        digest: Digest,
        size_bytes: u64,
        arriving: &impl Fn(u64, Duration, Duration),
    ) -> Result<Bytes> {
        let get = self.begin_get();
        let blob = fetch_blob(repository, what, digest, size_bytes, arriving).await?;
        self.end_get(get, blob.len());
        Ok(blob)
    }

    /// The last step: the blobs are made known to the engine, and the image can be read.
    async fn serve(
        mut self,
        manifest_digest: Digest,
        manifest: ErofsManifest,
        checked: CheckedImage,
        profile: Option<Profile>,
    ) -> Result<LoadedImage> {
        let (store, of_blocking) = (Arc::clone(self.store), manifest.clone());
        let prepared = blocking(move || checked.open(&store, &of_blocking)).await?;
        self.attachment.keep(prepared.kept);
        let profile = profile.and_then(|profile| self.with_room(profile));
        let new_blob = |(blob, digest): (&PreparedBlob, Digest)| NewBlob {
            kind: BlobKind::Layer,
            file: Arc::clone(&blob.file),
            source: self.source(digest, &blob.index),
            entries: blob.entries.clone(),
        };
        let new = prepared.blobs.iter().zip(manifest.devices().map(|blob| blob.digest)).map(new_blob).collect();
        let added = self.attachment.engine.add_blobs(self.attachment.image, new).await?;
        let blobs = prepared.blobs.into_iter().zip(added).zip(manifest.devices());
        let layer = |((blob, added), layer): ((PreparedBlob, AddedBlob), &LayerRef)| PlannedLayer {
            digest: Sha256(layer.digest.0),
            key: added.key,
            file: blob.file,
            index: blob.index,
            was_local: local(&blob.entries),
        };
        let layers: Vec<PlannedLayer> = blobs.map(layer).collect();
        let (hot, loaded) = match profile {
            Some(profile) => {
                let image_bytes = layers.iter().map(|layer| layer.index.raw_len_bytes()).sum();
                let (hot, loaded) = self.follow(profile, &layers, image_bytes).await?;
                (hot, Some(loaded))
            }
            None => (None, None),
        };
        let served = |layer: PlannedLayer| ServedBlob::new(layer.key, layer.file, layer.index, layer.was_local);
        let blobs = layers.into_iter().map(served).collect();
        self.counters.events.fetching_begins();
        self.attachment.hold(std::mem::take(self.held.get_mut()));
        let metadata = Arc::new(prepared.metadata);
        let (counters, attachment) = (Arc::clone(&self.counters), Some(self.attachment));
        let verity = VerityTable::of(&manifest, &prepared.map);
        let layers = manifest.layers.len();
        let image = ServedImage::new(metadata, prepared.map, layers, blobs, hot, counters, attachment);
        Ok(LoadedImage { image: Arc::new(image), manifest_digest, manifest, profile: loaded, verity })
    }

    /// This image's repository as a source of a blob's chunks.
    fn source(&self, blob: Digest, index: &Arc<ChunkIndex>) -> Arc<Source> {
        Arc::new(Source {
            repository: self.repository.clone(),
            blob,
            index: Arc::clone(index),
            read_deadline: self.read_deadline,
            counters: Arc::clone(&self.counters),
            attached: self.attached.clone(),
        })
    }

    /// An object of the store, which is held from now on.
    async fn stored(&self, digest: Digest) -> Result<Option<Bytes>> {
        let (hold, bytes) = stored(self.store, digest).await?;
        self.held.lock().push(hold);
        Ok(bytes)
    }

    async fn keep(&self, digest: Digest, bytes: Bytes) -> Result<()> {
        let store = Arc::clone(self.store);
        let kept = blocking(move || {
            let hold = store.hold(Sha256(digest.0));
            store.put_object(Sha256(digest.0), &bytes).map(|()| hold)
        });
        let hold = kept.await?;
        self.held.lock().push(hold);
        Ok(())
    }

    /// Keeps what may be there already.
    async fn keep_if_new(&self, digest: Digest, bytes: Bytes) -> Result<()> {
        if self.stored(digest).await?.is_some() { Ok(()) } else { self.keep(digest, bytes).await }
    }

    fn begin_get(&self) -> Get {
        self.counters.registry_requests.fetch_add(1, Ordering::Relaxed);
        Get::begin()
    }

    fn end_get(&self, mut get: Get, len_bytes: usize) {
        get.bytes = len_bytes as u64;
        self.counters.events.fetched(FetchClass::Attach, &get);
        self.counters.fetched_bytes.fetch_add(len_bytes as u64, Ordering::Relaxed);
    }
}

/// A whole blob of a repository; see [`Attaching::blob`].
async fn fetch_blob(
    repository: &Repository,
    what: &str,
    digest: Digest,
    size_bytes: u64,
    arriving: &impl Fn(u64, Duration, Duration),
) -> Result<Bytes> {
    let asked = Instant::now();
    let mut reader = repository.blob(&digest, size_bytes).await.map_err(|error| Error::registry(what, error))?;
    let (answered, round_trip) = (Instant::now(), asked.elapsed());
    let mut blob = Vec::new();
    // The reader ends at that size; it fails if the digest differs.
    while reader.read_buf(&mut blob).await.map_err(|error| match error.downcast() {
        Ok(error) => Error::registry(what, error),
        Err(error) => Error::io(what, error),
    })? > 0
    {
        arriving(blob.len() as u64, answered.elapsed(), round_trip);
    }
    Ok(Bytes::from(blob))
}

fn parse(digest: Digest, manifest: &[u8]) -> Result<ErofsManifest> {
    ErofsManifest::parse(manifest).map_err(|error| bad_manifest(digest, error))
}

/// Checks a metadata blob, and gives its share of memory back.
async fn check(store: &Arc<Store>, manifest: &ErofsManifest, blob: Bytes, share: Share) -> Result<CheckedImage> {
    let (of_blocking, manifest) = (Arc::clone(store), manifest.clone());
    let (raw_len_bytes, manifest, blob) =
        blocking(move || Ok((prepare::raw_len_bytes(&manifest, &blob), manifest, blob))).await?;
    let raw_share = store.memory().raw.take(raw_len_bytes).await?;
    blocking(move || {
        let checked = CheckedImage::new(&of_blocking, &manifest, &blob);
        drop((blob, share, raw_share));
        checked
    })
    .await
}

/// An object of the store, held whether it is there or not. Beside the runtime, also the hold: it may wait for a removal.
async fn stored(store: &Arc<Store>, digest: Digest) -> Result<(HeldObject, Option<Bytes>)> {
    let store = Arc::clone(store);
    blocking(move || {
        let hold = store.hold(Sha256(digest.0));
        Ok((hold, store.object(Sha256(digest.0))?.map(Bytes::from)))
    })
    .await
}

/// Names the link to a registry host; a directory is one of its own.
fn link_name(location: &Location, client: &ClientOptions) -> String {
    match location {
        Location::Registry(reference) if client.plain_http => format!("http://{}", reference.registry()),
        Location::Registry(reference) => format!("https://{}", reference.registry()),
        Location::Layout { dir, .. } => format!("oci:{}", dir.display()),
    }
}

/// Makes sure that an error names what the user asked for.
fn about(location: &Location, error: Error) -> Error {
    let name = location.to_string();
    if error.chain().contains(&name) { error } else { Error::caused(error.kind(), format!("attach {name}"), error) }
}

/// A manifest that breaks a rule is the producer's fault, not the user's.
fn bad_manifest(digest: Digest, error: ublkimg_registry::Error) -> Error {
    match error.kind() {
        ublkimg_registry::ErrorKind::Invalid => Error::caused(ErrorKind::Corrupt, format!("manifest {digest}"), error),
        _ => Error::registry(format!("manifest {digest}"), error),
    }
}

/// Runs work that may block on the disk or take long.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::caused(ErrorKind::Internal, "attaching was interrupted", error))?
}
