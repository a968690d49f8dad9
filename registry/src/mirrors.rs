//! A repository of a registry that has mirrors: reads are tried at each mirror in turn, and at last at the registry.
//!
//! A mirror gets one attempt, and whatever it answers instead of the bytes, the next one is asked at once; only the registry
//! itself is worth waiting for. A mirror that lacks a blob is not asked for that blob again, one that failed is not asked for
//! anything, for a minute. Nor is any mirror asked for a blob of which wrong bytes came: nobody knows who sent them. What is
//! written, and what is read in order to be written, goes to the registry alone: a mirror may be behind. Each place has
//! credentials and connections of its own; nothing of one is shown to another.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::Instant;

use crate::blob::{BlobReader, LastTrouble};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::hosts::{Host, Hosts};
use crate::options::ClientOptions;
use crate::reference::Reference;
use crate::remote::Remote;
use crate::repository::Resolved;

/// How long a mirror is left alone. A mirror that hangs costs one time limit a minute.
const REST: Duration = Duration::from_secs(60);
/// A mirror is near; who waits longer for a connection should ask the registry.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Blobs that a mirror is known to lack: several times the layers that an image may have.
const ABSENT_MAX: usize = 512;

/// See the module.
#[derive(Debug)]
pub(crate) struct Mirrored {
    mirrors: Vec<Mirror>,
    registry: Arc<Remote>,
}

#[derive(Debug)]
struct Mirror {
    remote: Arc<Remote>,
    pulls: bool,
    resolves: bool,
    memory: Mutex<Memory>,
}

/// When what went wrong may be forgotten.
#[derive(Debug, Default)]
struct Memory {
    rests_until: Option<Instant>,
    absent_until: HashMap<Digest, Instant>,
}

impl Mirrored {
    pub(crate) fn new(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let hosts = Hosts::of(reference, options)?;
        let connect_timeout = options.connect_timeout.min(CONNECT_TIMEOUT);
        let once = ClientOptions { retry_deadline: Duration::ZERO, connect_timeout, ..options.clone() };
        let mirror = |host: Host| {
            let remote = Arc::new(Remote::new(reference, host.endpoint, &once)?);
            Ok(Mirror { remote, pulls: host.pulls, resolves: host.resolves, memory: Mutex::default() })
        };
        let mirrors = hosts.mirrors.into_iter().map(mirror).collect::<Result<_>>()?;
        Ok(Self { mirrors, registry: Arc::new(Remote::new(reference, hosts.server, options)?) })
    }

    /// The registry itself, to be written to.
    pub(crate) fn registry(&self) -> &Arc<Remote> {
        &self.registry
    }

    /// The same repository without its mirrors.
    pub(crate) fn without_mirrors(&self) -> Self {
        Self { mirrors: Vec::new(), registry: Arc::clone(&self.registry) }
    }

    /// Asks no mirror for this blob, for a while; false when there is none.
    pub(crate) fn distrust(&self, digest: &Digest) -> bool {
        self.mirrors.iter().for_each(|mirror| mirror.lacks(*digest));
        !self.mirrors.is_empty()
    }

    pub(crate) async fn resolve(&self) -> Result<Resolved> {
        // What has a digest is the same everywhere.
        let by_digest = self.registry.digest();
        for mirror in self.mirrors.iter().filter(|mirror| match &by_digest {
            Some(digest) => mirror.has(digest),
            None => mirror.resolves && mirror.is_awake(),
        }) {
            if let Some(resolved) = mirror.note(by_digest.as_ref(), mirror.remote.resolve().await) {
                return Ok(resolved);
            }
        }
        self.registry.resolve().await
    }

    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Bytes> {
        for mirror in self.mirrors.iter().filter(|mirror| mirror.has(digest)) {
            if let Some(bytes) = mirror.note(Some(digest), mirror.remote.manifest(digest).await) {
                return Ok(bytes);
            }
        }
        self.registry.manifest(digest).await
    }

    pub(crate) async fn blob_range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        for mirror in self.mirrors.iter().filter(|mirror| mirror.has(digest)) {
            if let Some(bytes) = mirror.note(Some(digest), mirror.remote.blob_range(digest, range.clone()).await) {
                return Ok(bytes);
            }
        }
        self.registry.blob_range(digest, range).await
    }

    /// As [`Remote::blob_stream`].
    pub(crate) fn blob_stream(
        self: &Arc<Self>,
        digest: Digest,
        range: Range<u64>,
        trouble: LastTrouble,
    ) -> BoxStream<'static, Result<Bytes>> {
        if self.mirrors.is_empty() {
            return Remote::blob_stream(&self.registry, digest, range, trouble);
        }
        let source = Pieces { mirrored: Arc::clone(self), digest, rest: range, trouble, tried: 0, open: None };
        stream::try_unfold(source, |mut source| async move {
            let piece = source.next().await?;
            Ok(piece.map(|piece| (piece, source)))
        })
        .boxed()
    }

    /// As [`Remote::blob`].
    pub(crate) async fn blob(self: &Arc<Self>, digest: Digest, size_bytes: u64) -> Result<BlobReader> {
        if self.mirrors.is_empty() {
            return Remote::blob(&self.registry, digest, size_bytes).await;
        }
        let mut pieces = self.blob_stream(digest, 0..size_bytes, LastTrouble::default());
        // Here, so that a missing blob is an error of this call.
        let first = pieces.next().await.transpose()?;
        let pieces = stream::iter(first.map(Ok)).chain(pieces);
        Ok(BlobReader::verified(pieces.boxed(), digest, size_bytes))
    }
}

/// A range that goes on at the next place where one breaks off.
struct Pieces {
    mirrored: Arc<Mirrored>,
    digest: Digest,
    rest: Range<u64>,
    trouble: LastTrouble,
    /// Mirrors that are behind us, the open one among them.
    tried: usize,
    /// From that mirror, or from the registry.
    open: Option<(Option<usize>, BoxStream<'static, Result<Bytes>>)>,
}

impl Pieces {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.open.is_none() {
                self.open = Some(self.open_next());
            }
            let Some((place, pieces)) = &mut self.open else { continue };
            match (pieces.next().await.transpose(), *place) {
                (Ok(piece), _) => {
                    self.rest.start += piece.as_ref().map_or(0, |piece| piece.len() as u64);
                    return Ok(piece);
                }
                (Err(error), Some(mirror)) => {
                    self.mirrored.mirrors[mirror].failed(Some(&self.digest), &error);
                    self.open = None;
                }
                (Err(error), None) => return Err(error),
            }
        }
    }

    fn open_next(&mut self) -> (Option<usize>, BoxStream<'static, Result<Bytes>>) {
        let mut untried = (self.tried..).zip(&self.mirrored.mirrors[self.tried..]);
        let (digest, rest, trouble) = (self.digest, self.rest.clone(), self.trouble.clone());
        match untried.find(|(_, mirror)| mirror.has(&digest)) {
            Some((index, mirror)) => {
                self.tried = index + 1;
                (Some(index), Remote::blob_stream(&mirror.remote, digest, rest, trouble))
            }
            None => (None, Remote::blob_stream(&self.mirrored.registry, digest, rest, trouble)),
        }
    }
}

impl Mirror {
    /// Neither failed a short while ago nor told us to come later.
    fn is_awake(&self) -> bool {
        let rests = self.memory(|memory| memory.rests_until.is_some_and(|until| Instant::now() < until));
        !rests && !self.remote.is_held()
    }

    /// Whether it is worth asking for this blob or manifest.
    fn has(&self, digest: &Digest) -> bool {
        let absent = |memory: &mut Memory| memory.absent_until.get(digest).is_some_and(|until| Instant::now() < *until);
        self.pulls && self.is_awake() && !self.memory(absent)
    }

    fn note<T>(&self, digest: Option<&Digest>, answer: Result<T>) -> Option<T> {
        answer.map_err(|error| self.failed(digest, &error)).ok()
    }

    /// It is not asked for this blob for a while.
    fn lacks(&self, digest: Digest) {
        self.memory(|memory| {
            if memory.absent_until.len() >= ABSENT_MAX {
                memory.absent_until.clear();
            }
            memory.absent_until.insert(digest, Instant::now() + REST);
        });
    }

    fn failed(&self, digest: Option<&Digest>, error: &Error) {
        if error.kind() == ErrorKind::NotFound {
            tracing::debug!("mirror: {error}");
            return digest.into_iter().for_each(|digest| self.lacks(*digest));
        }
        if self.is_awake() {
            tracing::warn!("a mirror is not asked for {} s: {error}", REST.as_secs());
        }
        self.memory(|memory| memory.rests_until = Some(Instant::now() + REST));
    }

    fn memory<T>(&self, look: impl FnOnce(&mut Memory) -> T) -> T {
        look(&mut self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
