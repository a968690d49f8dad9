//! A tree as an image of several layers, packed as a registry would have it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::Digest as _;
use ublkimg_image::Sha256;
use ublkimg_registry::descriptor::Platform;
use ublkimg_tests::oci_layout::OciLayout;

/// Bytes that are passed on at a time.
const PART_BYTES: usize = 1 << 20;

/// Packs what is below `tree` into `count` zstd layers of about the same length: an OCI layout at `dir` with the tag `bench`.
pub(crate) fn pack(tree: &Path, count: usize, dir: &Path) -> Result<()> {
    let layout = OciLayout::create(dir)?;
    let objects = objects(tree)?;
    let total_bytes: u64 = objects.iter().map(|(_, bytes)| bytes).sum();
    let (mut rest, mut before_bytes) = (&objects[..], 0);
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for number in 1..=count as u64 {
        let end_bytes = total_bytes * number / count as u64;
        let taken = rest.iter().take_while(|(_, bytes)| {
            before_bytes += bytes;
            before_bytes <= end_bytes || number == count as u64
        });
        let (of_layer, others) = rest.split_at(taken.count());
        before_bytes = total_bytes - others.iter().map(|(_, bytes)| bytes).sum::<u64>();
        rest = others;
        let (layer, diff_id) = pack_layer(tree, of_layer, &layout, dir)?;
        layers.push(layer);
        diff_ids.push(diff_id.to_string());
    }
    let architecture = Platform::host().architecture;
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = layout.add_blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    layout.add_manifest("bench", &manifest)?;
    Ok(())
}

/// The layer's descriptor and the digest of its archive.
fn pack_layer(tree: &Path, objects: &[(PathBuf, u64)], layout: &OciLayout, dir: &Path) -> Result<(Value, Sha256)> {
    let (list, packed) = (dir.join("list"), dir.join("layer"));
    let names: Vec<&[u8]> = objects.iter().map(|(path, _)| path.as_os_str().as_bytes()).collect();
    fs::write(&list, names.join(&0))?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(tree).args(["--null", "--no-recursion", "-c", "-T"]).arg(&list);
    let mut tar = tar.stdout(Stdio::piped()).spawn().context("tar")?;
    let mut archive = tar.stdout.take().context("tar has no output")?;
    let mut encoder = zstd::stream::write::Encoder::new(File::create(&packed)?, 3)?;
    let mut hasher = sha2::Sha256::new();
    copy(&mut archive, |part| {
        hasher.update(part);
        encoder.write_all(part)
    })?;
    encoder.finish()?.sync_all()?;
    ensure!(tar.wait()?.success(), "tar failed");
    let mut stored = sha2::Sha256::new();
    copy(&mut File::open(&packed)?, |part| {
        stored.update(part);
        Ok(())
    })?;
    let (digest, size) = (Sha256(stored.finalize().into()), fs::metadata(&packed)?.len());
    fs::rename(&packed, layout.blob_path(digest))?;
    fs::remove_file(&list)?;
    let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
    Ok((
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size }),
        Sha256(hasher.finalize().into()),
    ))
}

fn copy(from: &mut impl io::Read, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> Result<()> {
    let mut part = vec![0; PART_BYTES];
    loop {
        let len = from.read(&mut part)?;
        if len == 0 {
            return Ok(());
        }
        to(&part[..len])?;
    }
}

/// Everything below `tree`, with the length of files, directories before what is in them.
fn objects(tree: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut all = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(tree.join(&directory))? {
            let entry = entry?;
            let (path, metadata) = (directory.join(entry.file_name()), entry.metadata()?);
            if metadata.is_dir() {
                todo.push(path.clone());
            }
            all.push((path, if metadata.is_file() { metadata.len() } else { 0 }));
        }
    }
    all.sort();
    Ok(all)
}
