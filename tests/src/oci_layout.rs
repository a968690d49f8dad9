//! Writing OCI layout directories (OCI image spec, image-layout.md), good ones and bad ones.

use std::borrow::Borrow;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use serde_json::{Value, json};
use ublkimg_image::Sha256;

/// How a layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// One gzip member.
    Gzip,
    /// One zstd frame.
    Zstd,
}

impl Compression {
    fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    fn compress(self, tar: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::None => Ok(tar.to_vec()),
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(tar)?;
                encoder.finish()
            }
            Self::Zstd => zstd::bulk::compress(tar, 3),
        }
    }
}

/// A layer: its archive, and how it is stored.
pub struct Layer {
    /// The archive.
    pub tar: Vec<u8>,
    /// How it is stored.
    pub compression: Compression,
}

/// A layout directory that images are added to.
pub struct OciLayout {
    dir: PathBuf,
}

impl OciLayout {
    /// A new layout without images.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn create(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let index = json!({"schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": []});
        std::fs::write(dir.join("index.json"), index.to_string())?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where a blob lies.
    pub fn blob_path(&self, digest: Sha256) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Adds a blob; returns its descriptor.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn add_blob(&self, media_type: &str, bytes: &[u8]) -> io::Result<Value> {
        let digest = Sha256::of(bytes);
        std::fs::write(self.blob_path(digest), bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()}))
    }

    /// Adds an image of `layers`, lowest first, as `tag`; returns its manifest. Each layer is asked for when the one before
    /// it is written.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn add_image(&self, tag: &str, layers: impl IntoIterator<Item: Borrow<Layer>>) -> io::Result<Value> {
        let (mut diff_ids, mut blobs) = (Vec::new(), Vec::new());
        for layer in layers {
            let Layer { tar, compression } = layer.borrow();
            diff_ids.push(Sha256::of(tar).to_string());
            blobs.push(self.add_blob(compression.media_type(), &compression.compress(tar)?)?);
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.add_blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        let manifest = json!({"schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST, "config": config, "layers": blobs});
        self.add_manifest(tag, &manifest)?;
        Ok(manifest)
    }

    /// Adds a manifest as `tag`.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn add_manifest(&self, tag: &str, manifest: &Value) -> io::Result<()> {
        let mut descriptor = self.add_blob(MEDIA_TYPE_MANIFEST, manifest.to_string().as_bytes())?;
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let path = self.dir.join("index.json");
        let mut index: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        if let Some(manifests) = index["manifests"].as_array_mut() {
            manifests.push(descriptor);
        }
        std::fs::write(path, index.to_string())
    }
}

const MEDIA_TYPE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MEDIA_TYPE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
