//! What the registry holds: blobs, and per repository the manifests, tags and blobs that may be read through it.
//!
//! Contents lie in memory, in a directory (`blobs/sha256/HEX`, and `index.json` for the repositories), or where the OCI
//! layouts lie that were loaded: those are read in place.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use axum::body::Body;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use ublkimg_image::Sha256;

/// Body bytes handed to the HTTP server at a time.
const FRAME_BYTES: u64 = 256 * 1024;

/// Contents, wherever they lie.
#[derive(Clone)]
pub(crate) enum Blob {
    Memory(Bytes),
    File { path: PathBuf, size_bytes: u64 },
}

impl Blob {
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }

    pub(crate) fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::File { path, .. } => std::fs::read(path).map(Bytes::from),
        }
    }

    /// A part of it, which must lie inside it.
    pub(crate) fn body(&self, range: std::ops::Range<u64>) -> io::Result<Body> {
        let source: Arc<dyn Fn(u64, u64) -> io::Result<Bytes> + Send + Sync> = match self {
            Self::Memory(bytes) => {
                let bytes = bytes.clone();
                Arc::new(move |start, end| Ok(bytes.slice(index(start)?..index(end)?)))
            }
            Self::File { path, .. } => {
                let file = File::open(path)?;
                Arc::new(move |start, end| {
                    let mut buffer = vec![0; index(end - start)?];
                    file.read_exact_at(&mut buffer, start)?;
                    Ok(buffer.into())
                })
            }
        };
        let in_memory = matches!(self, Self::Memory(_));
        let frames = futures_util::stream::try_unfold(range.start, move |start| {
            let (source, end) = (Arc::clone(&source), range.end);
            async move {
                if start >= end {
                    return Ok(None);
                }
                let next = (start + FRAME_BYTES).min(end);
                let frame = if in_memory {
                    source(start, next)?
                } else {
                    tokio::task::spawn_blocking(move || source(start, next)).await??
                };
                Ok::<_, io::Error>(Some((frame, next)))
            }
        });
        Ok(Body::from_stream(frames))
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct RepositoryContents {
    /// Blobs that were pushed, mounted or loaded here.
    pub(crate) blobs: BTreeSet<String>,
    /// Media types by digest.
    pub(crate) manifests: BTreeMap<String, String>,
    /// Digests by tag.
    pub(crate) tags: BTreeMap<String, String>,
}

#[derive(Default)]
struct Contents {
    blobs: HashMap<Sha256, Blob>,
    repositories: BTreeMap<String, RepositoryContents>,
}

/// See the module. Holds whatever is pushed: bounded by the test that pushes.
pub(crate) struct Storage {
    dir: Option<PathBuf>,
    contents: Mutex<Contents>,
}

impl Storage {
    /// `dir`: what is pushed is kept there, and what was kept there is served again.
    pub(crate) fn open(dir: Option<PathBuf>) -> anyhow::Result<Self> {
        let mut contents = Contents::default();
        if let Some(dir) = &dir {
            std::fs::create_dir_all(blob_dir(dir)).with_context(|| format!("cannot create {}", dir.display()))?;
            for entry in std::fs::read_dir(blob_dir(dir))? {
                let entry = entry?;
                if let Some(digest) = entry.file_name().to_str().and_then(|name| Sha256::from_hex(name.as_bytes()).ok())
                {
                    let size_bytes = entry.metadata()?.len();
                    contents.blobs.insert(digest, Blob::File { path: entry.path(), size_bytes });
                }
            }
            if let Ok(index) = std::fs::read(dir.join("index.json")) {
                contents.repositories =
                    serde_json::from_slice(&index).with_context(|| format!("index.json in {}", dir.display()))?;
            }
        }
        Ok(Self { dir, contents: Mutex::new(contents) })
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a repository, which is created by that.
    fn change(&self, repository: &str, change: impl FnOnce(&mut RepositoryContents)) -> io::Result<()> {
        let mut contents = self.lock();
        change(contents.repositories.entry(repository.into()).or_default());
        let Some(dir) = &self.dir else { return Ok(()) };
        let new = dir.join("index.json.new");
        std::fs::write(&new, serde_json::to_vec(&contents.repositories)?)?;
        std::fs::rename(new, dir.join("index.json"))
    }

    /// Where an upload may be collected before its digest is known.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Adds contents whose digest was checked, readable through `repository`. A file is moved into the directory.
    pub(crate) fn add_blob(&self, repository: &str, digest: Sha256, blob: Blob) -> io::Result<()> {
        let kept = match (blob, &self.dir) {
            (Blob::Memory(bytes), Some(dir)) => {
                let path = blob_dir(dir).join(digest.hex());
                std::fs::write(&path, &bytes)?;
                Blob::File { path, size_bytes: bytes.len() as u64 }
            }
            (Blob::File { path, size_bytes }, Some(dir)) => {
                let kept = blob_dir(dir).join(digest.hex());
                std::fs::rename(path, &kept)?;
                Blob::File { path: kept, size_bytes }
            }
            (blob, None) => blob,
        };
        self.link_blob(repository, digest, kept)
    }

    /// Adds contents that stay where they are.
    pub(crate) fn link_blob(&self, repository: &str, digest: Sha256, blob: Blob) -> io::Result<()> {
        self.lock().blobs.insert(digest, blob);
        self.change(repository, |contents| {
            contents.blobs.insert(digest.to_string());
        })
    }

    /// Makes a blob of `from` readable through `repository`; `false` when `from` has no such blob.
    pub(crate) fn mount(&self, repository: &str, digest: Sha256, from: &str) -> io::Result<bool> {
        let exists = self.blob(from, digest).is_some();
        if exists {
            self.change(repository, |contents| {
                contents.blobs.insert(digest.to_string());
            })?;
        }
        Ok(exists)
    }

    /// Adds a manifest; its bytes are a blob too.
    pub(crate) fn add_manifest(
        &self,
        repository: &str,
        bytes: Bytes,
        media_type: &str,
        tag: Option<&str>,
    ) -> io::Result<Sha256> {
        let digest = Sha256::of(&bytes);
        self.add_blob(repository, digest, Blob::Memory(bytes))?;
        self.change(repository, |contents| {
            contents.manifests.insert(digest.to_string(), media_type.into());
            if let Some(tag) = tag {
                contents.tags.insert(tag.into(), digest.to_string());
            }
        })?;
        Ok(digest)
    }

    /// A blob that may be read through `repository`.
    pub(crate) fn blob(&self, repository: &str, digest: Sha256) -> Option<Blob> {
        let contents = self.lock();
        contents.repositories.get(repository).filter(|contents| contents.blobs.contains(&digest.to_string()))?;
        contents.blobs.get(&digest).cloned()
    }

    /// A manifest by tag or digest: digest, media type, contents.
    pub(crate) fn manifest(&self, repository: &str, reference: &str) -> Option<(Sha256, String, Blob)> {
        let contents = self.lock();
        let of_repository = contents.repositories.get(repository)?;
        let name = of_repository.tags.get(reference).map_or(reference, String::as_str);
        let media_type = of_repository.manifests.get(name)?.clone();
        let digest = name.parse().ok()?;
        Some((digest, media_type, contents.blobs.get(&digest)?.clone()))
    }

    pub(crate) fn repository(&self, repository: &str) -> Option<RepositoryContents> {
        self.lock().repositories.get(repository).cloned()
    }

    /// Forgets a blob or manifest in every repository.
    pub(crate) fn delete(&self, digest: Sha256) -> io::Result<()> {
        let name = digest.to_string();
        let repositories: Vec<String> = self.lock().repositories.keys().cloned().collect();
        for repository in repositories {
            self.change(&repository, |contents| {
                contents.blobs.remove(&name);
                contents.manifests.remove(&name);
                contents.tags.retain(|_, tagged| *tagged != name);
            })?;
        }
        if let (Some(Blob::File { path, .. }), Some(dir)) = (self.lock().blobs.remove(&digest), &self.dir)
            && path.starts_with(dir)
        {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }
}

fn blob_dir(dir: &Path) -> PathBuf {
    dir.join("blobs/sha256")
}
