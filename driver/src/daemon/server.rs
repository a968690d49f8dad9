//! The server: devices by name, and what commands ask of them.
//!
//! Control only. Reads never come through here: they go from a device's queue to the store, and to the engine when they
//! miss. Work on one name is done one request at a time; work on different names side by side.
//!
//! Invariants: a device is in `attached` exactly while it is in the kernel; its record is on disk from before it starts
//! until after it is gone.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ublkimg_image::Sha256;
use ublkimg_registry::profile::ProfileChoice;
use ublkimg_registry::{ClientOptions, Digest, Location};

use super::attached::{Attached, check_unused};
use super::listener::Reply;
use super::locks::NameLocks;
use super::protocol::{AddRequest, Answer, Fault, ProfileRequest, PullRequest, Request};
use super::recording::finish_all;
use super::start::Starting;
use super::state::{DeviceRecord, Records, boot_id};
use super::takeover::{self, HANDED_OVER_EXIT_CODE, Known};
use super::{Directories, cache, descriptors, leftovers, listener, names, recovery};
use crate::attach::{AttachOptions, LoadedImage, ProfileSource, attach};
use crate::device::{Prepared, QueueOptions};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::pull::Pulled;
use crate::recorder::recover_logs;
use crate::start_events::Mark;
use crate::store::{Limits, Store};
use crate::verity::VerityTable;
use crate::{capabilities, kept_chunks, kernel, namespace};

/// How long a read waits that is not to fail: longer than machines live.
const FOR_EVER: Duration = Duration::from_secs(50 * 365 * 24 * 3600);

/// Of -1000 (never) to 1000: before the last resort.
const OOM_SCORE_ADJUSTMENT: &str = "-900";

/// A killed server may take this long to let go of the store.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);

/// How often it is looked whether links have turned out to be others than is kept.
const LINKS_PERIOD: Duration = Duration::from_secs(60);

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it keeps its things.
    pub directories: Directories,
    /// How much room the store may take.
    pub limits: Limits,
    /// Take over from the server that is there.
    pub takes_over: bool,
    /// How long a device that cannot be taken back now is tried again, before its readers get EIO.
    pub recovery_timeout: Duration,
}

/// Runs a server until it is asked to stop. Must be called while the process has one thread.
///
/// # Errors
/// What kept it from starting: no rights, another server on the same root, no socket.
pub fn run_server(options: ServerOptions) -> Result<()> {
    let ServerOptions { directories, limits, takes_over, recovery_timeout } = options;
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    descriptors::raise_limit();
    // Who waits for a page of ours may be who is to be killed for memory: take others first.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJUSTMENT) {
        tracing::debug!("the score for the lack of memory is as it was: {error}");
    }
    // Nor may we wait for memory that comes free only when a reader of ours gets on. Threads inherit it.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("not an I/O flusher: {error}");
    }
    // Before any thread starts, and before recovery: see namespace.
    let detached = namespace::enter_private(&[&directories.root, &directories.run])?;
    tracing::info!(detached = detached.len(), "in a mount namespace of its own");
    capabilities::keep_needed()?;
    let store = if takes_over { Arc::new(Store::beside(&directories.root)?) } else { open_store(&directories)? };
    let engine = Engine::start(&store)?;
    let runtime = engine.runtime().clone();
    let known = if takes_over {
        let known = runtime.block_on(takeover::prepare(&directories, &store))?;
        takeover::take(&directories, &store)?;
        known
    } else {
        Known::default()
    };
    leftovers::remove(&directories);
    learn_kept_chunks(&runtime, &store);
    engine.seed_links(store.links()?);
    let server = Arc::new(Server {
        records: Records::new(directories.devices()),
        store,
        engine,
        boot_id: boot_id()?,
        attached: Mutex::new(BTreeMap::new()),
        device_came: tokio::sync::Notify::new(),
        locks: NameLocks::default(),
        stopping: AtomicBool::new(false),
        handed_over: AtomicBool::new(false),
        directories,
        limits,
        recovery_timeout,
    });
    runtime.block_on(server.run(known))
}

/// Finds out what earlier servers left; nobody waits for it.
fn learn_kept_chunks(runtime: &tokio::runtime::Handle, store: &Arc<Store>) {
    let store = Arc::clone(store);
    runtime.spawn_blocking(move || {
        if let Err(error) = kept_chunks::learn(&store) {
            tracing::warn!("store: chunks of earlier images may be fetched again: {}", error.chain());
        }
    });
}

/// Opens the store, waiting for a server that was killed to let go of it.
fn open_store(directories: &Directories) -> Result<Arc<Store>> {
    let deadline = Instant::now() + STORE_TIMEOUT;
    loop {
        match Store::open(&directories.root) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other.map(Arc::new),
        }
    }
}

pub(super) struct Server {
    pub(super) directories: Directories,
    pub(super) limits: Limits,
    pub(super) recovery_timeout: Duration,
    pub(super) records: Records,
    pub(super) store: Arc<Store>,
    pub(super) engine: Engine,
    pub(super) boot_id: String,
    pub(super) attached: Mutex<BTreeMap<String, Attached>>,
    /// Ends the pauses of those who look at devices now and then.
    pub(super) device_came: tokio::sync::Notify,
    pub(super) locks: NameLocks,
    /// Nothing is begun any more.
    stopping: AtomicBool,
    /// Another server waits for our end.
    handed_over: AtomicBool,
}

impl Server {
    async fn run(self: Arc<Self>, known: Known) -> Result<()> {
        recovery::recover(&self, known).await?;
        recover_logs(&self.store)?;
        let listener = listener::bind(&self.directories.socket())?;
        let handler = Arc::clone(&self);
        let terminated = terminated()?;
        tokio::spawn(Arc::clone(&self).watch_read_ahead());
        tokio::spawn(cache::keep_room(Arc::clone(&self)));
        tokio::spawn(Arc::clone(&self).keep_links_fresh());
        tracing::info!(socket = %self.directories.socket().display(), "serving");
        tokio::select! {
            () = listener::serve(listener, move |request| Arc::clone(&handler).handle(request)) => {}
            () = terminated => {}
        }
        let exit_code = if self.handed_over.load(Ordering::SeqCst) {
            // Readers wait, and there is nothing left to do. The socket stays: to the guard we have not ended well.
            HANDED_OVER_EXIT_CODE
        } else {
            let _ = std::fs::remove_file(self.directories.socket());
            self.leave_devices();
            0
        };
        // Not by returning: the engine that goes answers whoever waits with EIO, and queue threads would pass that on. What
        // the kernel takes from a process that has ended waits for the next server.
        std::process::exit(exit_code)
    }

    /// Keeps for the next server what only this one has.
    fn leave_devices(&self) {
        {
            let mut attached = self.attached.lock();
            finish_all(&mut attached);
            for name in attached.keys() {
                tracing::warn!(device = name, "left to the next server");
            }
        }
        self.keep_links();
        if let Err(error) = self.store.sync() {
            tracing::warn!("what was fetched last may be fetched again after a power cut: {}", error.chain());
        }
    }

    /// Keeps what is known of links. It is worth a few round trips of a later start: trouble is logged.
    pub(super) fn keep_links(&self) {
        if let Err(error) = self.store.put_links(&self.engine.links()) {
            tracing::warn!("what is known of links is not kept: {}", error.chain());
        }
    }

    /// Keeps it while it is found out: a server that is killed has no time for that. Runs as long as the server.
    async fn keep_links_fresh(self: Arc<Self>) {
        let mut kept = Vec::new();
        loop {
            tokio::time::sleep(LINKS_PERIOD).await;
            let links = self.engine.links();
            if links != kept {
                let server = Arc::clone(&self);
                let _ = tokio::task::spawn_blocking(move || server.keep_links()).await;
                kept = links;
            }
        }
    }

    async fn handle(self: Arc<Self>, request: Request) -> Reply {
        let is_stop = matches!(request, Request::Stop { .. } | Request::HandOver);
        let result = match request {
            Request::Ping => Ok(Answer::Pong { pid: std::process::id() }),
            // In a task of its own: it must go on to its end when the client hangs up.
            Request::Add(request) => flatten(tokio::spawn(async move { self.add(request).await }).await),
            Request::Pull(request) => {
                flatten(tokio::spawn(async move { self.pull(request).await }).await).map(Answer::Pulled)
            }
            Request::Mounted { name, directory } => {
                flatten(tokio::spawn(async move { self.mounted(&name, directory).await }).await).map(|()| Answer::Done)
            }
            Request::Remove { name, force } => {
                flatten(tokio::spawn(async move { self.remove(&name, force).await }).await).map(|()| Answer::Done)
            }
            Request::Figures { name } => self.figures(&name).await,
            Request::Events { name } => self.events(&name),
            Request::RecordStart { name, command, read_ahead_kb } => {
                let start = async move { self.record_start(&name, command, read_ahead_kb).await };
                flatten(tokio::spawn(start).await).map(|()| Answer::Done)
            }
            Request::RecordStop { name } => flatten(tokio::spawn(async move { self.record_stop(&name).await }).await),
            Request::Ready { name } => {
                flatten(tokio::spawn(async move { self.ready(&name).await }).await).map(|()| Answer::Done)
            }
            Request::Warm { name } => self.warm(&name),
            Request::EndWarming { name } => self.end_warming(&name).map(|()| Answer::Done),
            Request::Fill { name, mode } => {
                flatten(tokio::spawn(async move { self.fill(&name, mode).await }).await).map(|()| Answer::Done)
            }
            Request::Cache(request) => cache::serve_here(self, request).await.map(Answer::Cache),
            Request::List => Ok(Answer::Devices(self.attached.lock().values().map(Attached::status).collect())),
            Request::HandOver => flatten(tokio::spawn(self.hand_over()).await).map(|()| Answer::Done),
            Request::Stop { keep_devices } => self.stop(keep_devices).map(|()| Answer::Done),
        };
        let is_last = is_stop && result.is_ok();
        let answer = result.unwrap_or_else(|error| {
            tracing::warn!("request failed: {}", error.chain());
            Answer::Failed(Fault { kind: error.kind(), message: error.chain() })
        });
        Reply { answer, is_last }
    }

    async fn add(self: Arc<Self>, request: AddRequest) -> Result<Answer> {
        let name = request.name.clone().unwrap_or_else(|| names::from_reference(&request.reference));
        names::check(&name)?;
        let _name_lock = self.locks.lock(&name).await;
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "the daemon is ending: try again"));
        }
        if let Some(attached) = self.attached.lock().get(&name) {
            if attached.record.reference == request.reference {
                check_verity(request.verity, attached.verity.as_ref(), &request.reference)?;
                return Ok(Answer::Added { device: Box::new(attached.status()), created: false });
            }
            let text = format!("{name} serves {} already: give another --name", attached.record.reference);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        descriptors::check_room()?;
        let transport = blocking(move || kernel::choose(request.transport)).await?;
        let location: Location = parse_location(&request.reference)?;
        let holds_reads = request.holds_reads;
        let client = client(request.plain_http, &request.auth_file, &request.credential_files, &request.hosts_dirs);
        let mut options = options(client, request.read_timeout_ms, holds_reads);
        options.attach_deadline = Duration::from_millis(request.attach_timeout_ms);
        options.profile = source(&request.start.profile)?;
        options.command = command(&request.start.command);
        let loaded = attach(&self.store, &self.engine, &location, &options).await?;
        check_verity(request.verity, loaded.verity.as_ref(), &request.reference)?;
        descriptors::check_room()?;
        let record = DeviceRecord {
            name,
            reference: request.reference,
            manifest: loaded.manifest_digest.to_string(),
            transport,
            ublk_id: None,
            creator_pid: None,
            plain_http: request.plain_http,
            auth_file: request.auth_file,
            credential_files: request.credential_files,
            hosts_dirs: request.hosts_dirs,
            read_timeout_ms: request.read_timeout_ms,
            holds_reads,
            profile: loaded.profile.as_ref().map(|profile| profile.kept.clone()),
            start: request.start,
            mounts: Vec::new(),
            boot_id: self.boot_id.clone(),
        };
        let server = Arc::clone(&self);
        let queue = request.queue;
        let attached = blocking(move || server.start(loaded, record, queue)).await?;
        let device = Box::new(attached.status());
        self.attached.lock().insert(device.name.clone(), attached);
        self.device_came.notify_waiters();
        Ok(Answer::Added { device, created: true })
    }

    async fn pull(self: Arc<Self>, request: PullRequest) -> Result<Pulled> {
        pull_here(&self.store, &self.engine, &request).await
    }

    /// Makes the device: record first, so that a server that dies here is succeeded by one that knows of it.
    fn start(&self, loaded: LoadedImage, mut record: DeviceRecord, queue: QueueOptions) -> Result<Attached> {
        let mut start = starting(&loaded, &record);
        let (image, verity) = (loaded.image, loaded.verity);
        let fuse_directory = self.directories.fuse().join(&record.name);
        let prepared = Prepared::new(record.transport, Arc::clone(&image), queue, &fuse_directory)?;
        record.ublk_id = prepared.ublk_id();
        record.creator_pid = record.ublk_id.map(|_| std::process::id());
        self.records.write(&record)?;
        match prepared.start() {
            Ok(device) => {
                start.begin(&self.store, &record.name, device.path());
                Ok(Attached { record, device, image, start, verity })
            }
            Err(error) => {
                if let Err(error) = self.records.remove(&record.name) {
                    tracing::warn!("{}", error.chain());
                }
                Err(error)
            }
        }
    }

    async fn mounted(self: Arc<Self>, name: &str, directory: PathBuf) -> Result<()> {
        let _name_lock = self.locks.lock(name).await;
        let mut record = self.record_of(name)?;
        if record.mounts.contains(&directory) {
            return Ok(());
        }
        record.mounts.push(directory);
        self.change_record(record).await?;
        self.with_device(name, |attached| attached.image.events().mark(Mark::Mount))
    }

    /// What is written down of a device.
    pub(super) fn record_of(&self, name: &str) -> Result<DeviceRecord> {
        Ok(self.attached.lock().get(name).ok_or_else(|| no_device(name))?.record.clone())
    }

    /// Writes down another thing of a device, under its name's lock.
    pub(super) async fn change_record(self: &Arc<Self>, record: DeviceRecord) -> Result<()> {
        let (server, written) = (Arc::clone(self), record.clone());
        blocking(move || server.records.write(&written)).await?;
        self.with_device(&record.name.clone(), |attached| attached.record = record)
    }

    async fn remove(self: Arc<Self>, name: &str, force: bool) -> Result<()> {
        let _name_lock = self.locks.lock(name).await;
        let device = self.attached.lock().get(name).map(|attached| attached.device.path().to_path_buf());
        let device = device.ok_or_else(|| no_device(name))?;
        if !force {
            let name = name.to_owned();
            blocking(move || check_unused(&name, &device)).await?;
        }
        let Some(attached) = self.attached.lock().remove(name) else { return Err(no_device(name)) };
        let server = Arc::clone(&self);
        blocking(move || server.stop_device(attached, force)).await
    }

    fn stop_device(&self, attached: Attached, force: bool) -> Result<()> {
        let Attached { record, device, image, mut start, .. } = attached;
        let stopped = device.stop();
        if let Some(recorder) = start.take_recorder()
            && let Err(error) = recorder.stop()
        {
            tracing::warn!(device = record.name, "{}", error.chain());
        }
        drop(start);
        drop(image);
        self.keep_links();
        // There for the FUSE transport only, and empty unless its mount is held.
        let _ = std::fs::remove_dir(self.directories.fuse().join(&record.name));
        match stopped {
            Ok(()) => self.records.remove(&record.name),
            // It is doomed: the kernel finishes by itself.
            Err(error) if error.kind() == ErrorKind::Busy => {
                self.records.remove(&record.name)?;
                tracing::warn!(device = record.name, "removed while in use: {error}");
                if force { Ok(()) } else { Err(error) }
            }
            // Its record stays for the next server, which finds out what became of it.
            Err(error) => Err(error),
        }
    }

    /// Finishes what the next server cannot, while readers are still served; then the server ends.
    async fn hand_over(self: Arc<Self>) -> Result<()> {
        self.stop(true)?;
        let server = Arc::clone(&self);
        let finished = blocking(move || {
            finish_all(&mut server.attached.lock());
            server.keep_links();
            server.store.sync()
        });
        if let Err(error) = finished.await {
            tracing::warn!("handing over: {}", error.chain());
        }
        self.handed_over.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the server may end now; if so it begins nothing any more.
    fn stop(&self, keep_devices: bool) -> Result<()> {
        // First this, then the look: a request that is not seen now sees that we are stopping.
        self.stopping.store(true, Ordering::SeqCst);
        let refusal = {
            let attached = self.attached.lock();
            match attached.keys().next() {
                _ if self.locks.any_held() => {
                    Some("another command is at work: try again when it has ended".to_owned())
                }
                Some(name) if !keep_devices => Some(format!(
                    "devices are served, {} in all, {name} among them: `ublkimg rm` them first",
                    attached.len()
                )),
                _ => None,
            }
        };
        if let Some(text) = refusal {
            self.stopping.store(false, Ordering::SeqCst);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Ok(())
    }
}

/// What [`Request::Pull`] asks for, in this process.
///
/// # Errors
/// As [`crate::pull::pull`]; `Invalid` for a reference or a profile that is none.
pub async fn pull_here(store: &Arc<Store>, engine: &Engine, request: &PullRequest) -> Result<Pulled> {
    let location = parse_location(&request.reference)?;
    let client = client(request.plain_http, &request.auth_file, &request.credential_files, &request.hosts_dirs);
    let mut options = options(client, request.read_timeout_ms, false);
    options.profile = source(&request.start.profile)?;
    options.command = command(&request.start.command);
    crate::pull::pull(store, engine, &location, &options, request.what).await
}

/// Where the profile comes from that a request asks for.
fn source(request: &ProfileRequest) -> Result<ProfileSource> {
    let bad = |error| Error::caused(ErrorKind::Invalid, "profile", error);
    Ok(match request {
        ProfileRequest::Auto => ProfileSource::Published(ProfileChoice::Auto),
        ProfileRequest::None => ProfileSource::Published(ProfileChoice::None),
        ProfileRequest::Named(name) => ProfileSource::Published(name.parse().map_err(bad)?),
        ProfileRequest::File(path) => ProfileSource::File(path.clone()),
    })
}

/// The digest that chooses a profile; none for a command that is not known.
fn command(argv: &[String]) -> Option<Digest> {
    (!argv.is_empty()).then(|| Digest(ublkimg_image::trace::command_digest(argv).0))
}

/// The start of what was loaded.
pub(super) fn starting(loaded: &LoadedImage, record: &DeviceRecord) -> Starting {
    let layers = loaded.manifest.layers.iter().map(|layer| Sha256(layer.digest.0)).collect();
    let manifest = Sha256(loaded.manifest_digest.0);
    Starting::new(Arc::clone(&loaded.image), manifest, layers, record.start.clone(), loaded.profile.clone())
}

/// The location that a request or a record names.
fn parse_location(text: &str) -> Result<Location> {
    text.parse().map_err(|error| Error::caused(ErrorKind::Invalid, format!("{text:?} is no reference"), error))
}

/// Where the chunks of a recorded device come from, and how.
pub(super) fn options_of(record: &DeviceRecord) -> Result<(Location, AttachOptions)> {
    let client = client(record.plain_http, &record.auth_file, &record.credential_files, &record.hosts_dirs);
    Ok((parse_location(&record.reference)?, options(client, record.read_timeout_ms, record.holds_reads)))
}

/// How the registry of a request or a record is spoken to.
fn client(
    plain_http: bool,
    auth_file: &Option<PathBuf>,
    credential_files: &[PathBuf],
    hosts_dirs: &[PathBuf],
) -> ClientOptions {
    ClientOptions {
        plain_http,
        auth_file: auth_file.clone(),
        credential_files: credential_files.to_vec(),
        hosts_dirs: hosts_dirs.to_vec(),
        ..ClientOptions::default()
    }
}

fn options(client: ClientOptions, read_timeout_ms: u64, holds_reads: bool) -> AttachOptions {
    AttachOptions {
        client,
        read_deadline: if holds_reads { FOR_EVER } else { Duration::from_millis(read_timeout_ms) },
        ..AttachOptions::default()
    }
}

/// Runs something that may block in the kernel beside the runtime.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    flatten(tokio::task::spawn_blocking(work).await)
}

fn flatten<T>(joined: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    joined.unwrap_or_else(|error| Err(Error::caused(ErrorKind::Internal, "a task of the daemon died", error)))
}

fn check_verity(wanted: bool, table: Option<&VerityTable>, reference: &str) -> Result<()> {
    if !wanted || table.is_some() {
        return Ok(());
    }
    let text = format!("{reference} has no dm-verity tree: convert it with `ublkimg convert --verity`");
    Err(Error::new(ErrorKind::NotOurs, text))
}

pub(super) fn no_device(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("no device {name}"))
}

/// Resolves when the process is asked to end.
fn terminated() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let on = |kind| signal(kind).map_err(|error| Error::io("cannot handle signals", error));
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
