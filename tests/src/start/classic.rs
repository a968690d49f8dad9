//! The way it is done without ublkimg: fetch every layer whole, unpack them one on another, then start.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use ublkimg_registry::descriptor::{Descriptor, Manifest};
use ublkimg_registry::{ClientOptions, Location, Repository};

/// What docker and containerd fetch at a time by default.
const PARALLEL_DOWNLOADS: usize = 3;

/// Pulls the image and unpacks it below `dir`: the layers' directories, lowest first, ready to be an overlay's lower ones.
///
/// # Errors
///
/// The registry does not answer, or tar fails.
pub async fn pull(location: &Location, dir: &Path) -> Result<Vec<PathBuf>> {
    let repository = Repository::open(location, &ClientOptions::default()).await?;
    let manifest: Manifest = serde_json::from_slice(&repository.resolve().await?.bytes)?;
    std::fs::create_dir_all(dir)?;
    let slots = Arc::new(Semaphore::new(PARALLEL_DOWNLOADS));
    let config = download(&repository, &manifest.config, dir.join("config.json"), &slots);
    let layers: Vec<_> = (0..)
        .zip(&manifest.layers)
        .map(|(i, layer)| download(&repository, layer, dir.join(format!("layer{i}.tar.gz")), &slots))
        .collect();
    config.await??;
    let mut trees = Vec::new();
    for (i, layer) in layers.into_iter().enumerate() {
        let file = layer.await??;
        let tree = dir.join(format!("layer{i}"));
        trees.push(tree.clone());
        tokio::task::spawn_blocking(move || unpack(&file, &tree)).await??;
    }
    Ok(trees)
}

fn download(
    repository: &Repository,
    blob: &Descriptor,
    to: PathBuf,
    slots: &Arc<Semaphore>,
) -> JoinHandle<Result<PathBuf>> {
    let (repository, slots) = (repository.clone(), Arc::clone(slots));
    let (digest, size_bytes) = (blob.digest, blob.size);
    tokio::spawn(async move {
        let _slot = slots.acquire().await?;
        let mut reader = repository.blob(&digest, size_bytes).await?;
        let mut file = tokio::fs::File::create(&to).await?;
        tokio::io::copy(&mut reader, &mut file).await.with_context(|| format!("cannot pull {digest}"))?;
        Ok(to)
    })
}

/// Unpacks one layer and turns OCI whiteouts into overlayfs's, as containerd's snapshotter does.
fn unpack(archive: &Path, tree: &Path) -> Result<()> {
    std::fs::create_dir_all(tree)?;
    let status = Command::new("tar")
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xzpf"])
        .arg(archive)
        .arg("-C")
        .arg(tree)
        .status()?;
    if !status.success() {
        bail!("tar ended with {status}");
    }
    convert_whiteouts(tree)
}

fn convert_whiteouts(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            convert_whiteouts(&path)?;
        }
        let name = entry.file_name();
        let Some(hidden) = name.to_str().and_then(|name| name.strip_prefix(".wh.")) else { continue };
        std::fs::remove_file(&path)?;
        if hidden == ".wh..opq" {
            setxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
        } else {
            mknodat(CWD, dir.join(hidden), FileType::CharacterDevice, Mode::empty(), makedev(0, 0))?;
            debug_assert!(std::fs::symlink_metadata(dir.join(hidden))?.file_type().is_char_device());
        }
    }
    Ok(())
}
