//! An OCI distribution registry for tests, in this process: real HTTP over loopback, a shaped link in between,
//! counters, and faults.
//!
//! ```text
//! socket ─ link (connection) ─ HTTP ─ stats ─ faults ─ auth ─ distribution ─ storage
//!                                └─ /_stats, /_faults
//! ```
//!
//! The layers know nothing of each other. It runs on threads of its own, so tests need not be asynchronous, and stops
//! when it is dropped.

mod alarm;
mod answer;
mod auth;
mod connection;
mod control;
mod distribution;
mod faults;
mod layout;
mod link;
mod listener;
mod range;
mod stats;
mod storage;
mod toxics;
mod uploads;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::middleware::from_fn_with_state;
use bytes::Bytes;
use tokio::runtime::Runtime;
use ublkimg_image::Sha256;

pub use auth::{Auth, Credentials};
pub use faults::{Fault, Toxic};
pub use link::LinkConfig;
pub use stats::{BlobStats, Stats};

use connection::ConnectionHandle;
use control::Control;
use distribution::Distribution;
use faults::Faults;
use link::Link;
use listener::LinkListener;
use stats::Counters;
use storage::{Blob, Storage};
use uploads::Uploads;

/// How a [`TestRegistry`] starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The link to it.
    pub link: LinkConfig,
    /// What it asks of its clients.
    pub auth: Auth,
    /// Where it keeps what is pushed; in memory without.
    pub store_dir: Option<PathBuf>,
    /// Whether it has the referrers API.
    pub referrers: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            link: LinkConfig::default(),
            auth: Auth::default(),
            store_dir: None,
            referrers: true,
        }
    }
}

/// A running registry.
pub struct TestRegistry {
    address: SocketAddr,
    storage: Arc<Storage>,
    distribution: Arc<Distribution>,
    gate: Arc<auth::Gate>,
    control: Arc<Control>,
    link: Arc<Link>,
    runtime: Option<Runtime>,
}

impl TestRegistry {
    /// Starts it; it answers when this returns.
    ///
    /// # Errors
    ///
    /// The address or the directory cannot be used.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        let socket = std::net::TcpListener::bind(config.listen)
            .with_context(|| format!("cannot listen on {}", config.listen))?;
        let address = socket.local_addr()?;
        let storage = Arc::new(Storage::open(config.store_dir)?);
        let control = Arc::new(Control { counters: Arc::default(), faults: Arc::new(Faults::new()) });
        let link = Arc::new(Link::start(config.link)?);
        let gate = Arc::new(auth::Gate::new(config.auth, address));
        let (of_distribution, uploads) = (Arc::clone(&storage), Uploads::default());
        let distribution =
            Arc::new(Distribution { storage: of_distribution, uploads, has_referrers: config.referrers });

        let counters: &Arc<Counters> = &control.counters;
        let registry = Router::new()
            .fallback(distribution::handle)
            .with_state(Arc::clone(&distribution))
            .layer(from_fn_with_state(Arc::clone(&gate), auth::layer))
            .layer(from_fn_with_state(Arc::clone(&control.faults), toxics::layer))
            .layer(from_fn_with_state(Arc::clone(counters), stats::layer));
        let app = control::router(Arc::clone(&control)).fallback_service(registry);

        // One thread for requests, one so that a long hash or a slow disk does not hold up the link.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("test-registry")
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let listener = LinkListener::new(socket, Arc::clone(&link), Arc::clone(&control.faults), Arc::clone(counters))?;
        drop(entered);
        let service = app.into_make_service_with_connect_info::<ConnectionHandle>();
        runtime.spawn(async move { axum::serve(listener, service).await });
        Ok(Self { address, storage, distribution, gate, control, link, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `ADDR/REPOSITORY:TAG`, as the command line takes it.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.address)
    }

    /// The counters since the start or the last reset.
    pub fn stats(&self) -> Stats {
        self.control.counters.snapshot()
    }

    /// Starts counting anew.
    pub fn reset_stats(&self) {
        self.control.counters.reset();
    }

    /// Changes the link; open connections keep the window they have.
    pub fn set_link(&self, link: LinkConfig) {
        self.link.set(link);
    }

    /// Sets or replaces the fault `name`.
    pub fn set_fault(&self, name: &str, fault: Fault) {
        self.control.faults.change([(name.to_owned(), Some(fault))].into());
    }

    /// Takes the fault `name` away.
    pub fn clear_fault(&self, name: &str) {
        self.control.faults.change([(name.to_owned(), None)].into());
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.control.faults.clear();
    }

    /// No token that it has given out is good any more.
    pub fn revoke_tokens(&self) {
        self.gate.revoke_tokens();
    }

    /// Requests that met the fault `name` since it was set: a test of a fault must see that it was met.
    pub fn fault_hits(&self, name: &str) -> u64 {
        self.control.faults.hits(name)
    }

    /// Uploads that were begun, and neither ended nor called off.
    pub fn open_uploads(&self) -> usize {
        self.distribution.uploads.count()
    }

    /// Serves the image `layout_tag` (`None`: the only one) of the OCI layout `layout` as `repository:tag`. Its blobs are
    /// read where they lie. Returns the digest of its manifest or index.
    ///
    /// # Errors
    ///
    /// It is not a layout, or has no such image, or lacks a part of it.
    pub fn load_layout(
        &self,
        layout: &Path,
        layout_tag: Option<&str>,
        repository: &str,
        tag: &str,
    ) -> anyhow::Result<Sha256> {
        layout::load(&self.storage, layout, layout_tag, repository, tag)
    }

    /// Puts a blob without HTTP.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn put_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> anyhow::Result<Sha256> {
        let bytes = bytes.into();
        let digest = Sha256::of(&bytes);
        self.storage.add_blob(repository, digest, Blob::Memory(bytes))?;
        Ok(digest)
    }

    /// Puts a manifest without HTTP and without a check of what it names.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn put_manifest(
        &self,
        repository: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
        tag: Option<&str>,
    ) -> anyhow::Result<Sha256> {
        Ok(self.storage.add_manifest(repository, bytes.into(), media_type, tag)?)
    }

    /// The contents of a blob or manifest of `repository`.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn contents(&self, repository: &str, digest: Sha256) -> anyhow::Result<Option<Bytes>> {
        Ok(self.storage.blob(repository, digest).map(|blob| blob.read()).transpose()?)
    }

    /// The contents of a manifest by tag or digest.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn manifest(&self, repository: &str, reference: &str) -> anyhow::Result<Option<Bytes>> {
        Ok(self.storage.manifest(repository, reference).map(|(_, _, blob)| blob.read()).transpose()?)
    }

    /// Forgets a blob or manifest in every repository.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn delete(&self, digest: Sha256) -> anyhow::Result<()> {
        Ok(self.storage.delete(digest)?)
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        // Not the runtime's own drop, which would panic where a test is asynchronous.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
