//! What an ublkimg image looks like as an OCI manifest: media types, annotation keys, and the typed view of both.
//!
//! The vocabulary is that of the draft *EROFS Image Layer Format Specification*: every layer blob is an
//! `application/vnd.erofs+zstd` layer with the role `device`, and the last layer, without a role, is the merged
//! metadata image. Annotations of our own, informational to everyone else, say where the bundle of chunk indexes lies in the
//! metadata blob, and what a layer blob was made of and how, so that it need not be made again.
//!
//! [`ErofsManifest::parse`] is strict: a manifest is either one that we can serve or an error that says what to do.
//! It knows ranges and digests, never EROFS bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::descriptor::{Descriptor, Index, MEDIA_TYPE_MANIFEST, Manifest, Platform};
use crate::{Digest, Error, ErrorKind, profile};

/// Media type of zstd frames that decompress to an EROFS image.
pub const MEDIA_TYPE_EROFS_ZSTD: &str = "application/vnd.erofs+zstd";
/// The operating system feature that marks a manifest of EROFS layers.
pub const OS_FEATURE_EROFS: &str = "erofs";
/// Value of [`ANNOTATION_ROLE`] for a blob that a later image points into.
pub const ROLE_DEVICE: &str = "device";

/// `start:end`, bytes of the blob that hold the chunk index with its skippable frame header.
pub const ANNOTATION_INDEX_RANGE: &str = "org.erofs.chunk-index.range";
/// Digest of the chunk index payload, without the frame header.
pub const ANNOTATION_INDEX_DIGEST: &str = "org.erofs.chunk-index.digest";
/// Digest of what the blob decompresses to.
pub const ANNOTATION_UNCOMPRESSED_DIGEST: &str = "org.erofs.uncompressed-digest";
/// How a later layer uses this one.
pub const ANNOTATION_ROLE: &str = "org.erofs.role";
/// `start:end`, bytes of the metadata blob that hold the bundle with its skippable frame header.
pub const ANNOTATION_BUNDLE_RANGE: &str = "vnd.ublkimg.bundle.range";
/// Digest of the (compressed) source layer that a layer blob was made from.
pub const ANNOTATION_SOURCE_LAYER: &str = "vnd.ublkimg.source-layer";
/// Digest of the source layer uncompressed.
pub const ANNOTATION_DIFF_ID: &str = "vnd.ublkimg.diff-id";
/// What decided, beside the source layer, the bytes of a layer blob: see [`LayerOrigin::settings`].
pub const ANNOTATION_SETTINGS: &str = "vnd.ublkimg.settings";
/// Digest of the merge record of a layer blob, without its frame header.
pub const ANNOTATION_RECORD_DIGEST: &str = "vnd.ublkimg.merge-record.digest";

/// Root of the dm-verity tree, on the descriptor of its blob, which it marks. Not `org.erofs.dmverity.root_digest`, which says
/// of a layer that it has a tree over itself.
pub const ANNOTATION_VERITY_ROOT: &str = "vnd.ublkimg.verity.root";

/// Most layer blobs of one image. Registries stop far earlier (ECR: 127 layers); the bound keeps tables small.
pub const LAYERS_MAX: usize = 512;
/// Largest layer blob, in bytes: the 16 TiB that 32-bit block addresses of 4 KiB can reach.
pub const LAYER_BYTES_MAX: u64 = 1 << 44;
/// Largest metadata blob, in bytes. It is held in memory whole; 20 bytes per inode are typical, so this is 25 million.
pub const METADATA_BYTES_MAX: u64 = 512 << 20;
/// Longest text of settings, in bytes.
const SETTINGS_BYTES_MAX: usize = 256;
/// Largest image config, in bytes; the distribution specification bounds manifests the same way.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// An image that we can serve, as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErofsManifest {
    /// The image config.
    pub config: Descriptor,
    /// The layer blobs, base first: the order of the first devices in the metadata image's table.
    pub layers: Vec<LayerRef>,
    /// The dm-verity tree over the device, if the image has one: the last device of that table.
    pub verity: Option<VerityRef>,
    /// The metadata blob.
    pub metadata: MetadataRef,
    /// Annotations of the manifest itself.
    pub annotations: BTreeMap<String, String>,
}

/// One layer blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRef {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size_bytes: u64,
    /// Bytes of the blob that hold the chunk index and its 8-byte skippable frame header; ends inside the blob.
    pub index_range: Range<u64>,
    /// Digest of the chunk index payload.
    pub index_digest: Digest,
    /// Digest of the decompressed blob, a complete EROFS image.
    pub uncompressed_digest: Digest,
    /// What it was made of, when recorded.
    pub origin: Option<LayerOrigin>,
}

/// What a layer blob was made of and how: who has the same layer and the same settings would make the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerOrigin {
    /// Digest of the source layer as its image states it; none in archives that state digests of uncompressed layers only.
    pub source_layer: Option<Digest>,
    /// Digest of the source layer uncompressed.
    pub diff_id: Digest,
    /// The converter's format and settings. Compared, never parsed; at most 256 bytes.
    pub settings: String,
    /// Digest of the merge record, which the chunk index does not cover.
    pub record_digest: Digest,
}

/// The blob with the dm-verity tree. Its salt is the digest of the decompressed metadata image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerityRef {
    /// The blob: chunks with an index, as those of layers are.
    pub tree: LayerRef,
    /// Digest of the tree's top block.
    pub root: Digest,
}

/// The blob with the merged metadata image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataRef {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size_bytes: u64,
    /// Bytes of the blob that hold the bundle of chunk indexes and its skippable frame header. The zstd frames of the
    /// metadata image fill the bytes before it.
    pub bundle_range: Range<u64>,
    /// Digest of the decompressed metadata image.
    pub uncompressed_digest: Digest,
}

impl ErofsManifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ErrorKind::NotOurs`] when it is a well-formed manifest of something else; [`ErrorKind::Invalid`] when it
    /// claims to be ours but breaks a rule (limits above, ranges inside the blobs, SHA-256 digests only).
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let manifest: Manifest = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(ErrorKind::Invalid, format!("image manifest: {error}")))?;
        let Some((last, others)) = manifest.layers.split_last() else {
            return Err(not_ours("the manifest has no layers"));
        };
        let (verity, devices) = match others.split_last() {
            Some((tree, devices)) if tree.annotations.contains_key(ANNOTATION_VERITY_ROOT) => (Some(tree), devices),
            _ => (None, others),
        };
        if last.media_type != MEDIA_TYPE_EROFS_ZSTD || !last.annotations.contains_key(ANNOTATION_BUNDLE_RANGE) {
            return Err(not_ours(&format!("its last layer is {}", last.media_type)));
        }
        if devices.len() > LAYERS_MAX {
            return Err(invalid(&format!("{} layers, at most {LAYERS_MAX} are supported", devices.len())));
        }
        if manifest.config.size > CONFIG_BYTES_MAX {
            return Err(invalid(&format!("config of {} bytes", manifest.config.size)));
        }
        Ok(Self {
            config: manifest.config,
            layers: devices.iter().map(LayerRef::from_descriptor).collect::<Result<_, _>>()?,
            verity: verity.map(VerityRef::from_descriptor).transpose()?,
            metadata: MetadataRef::from_descriptor(last)?,
            annotations: manifest.annotations,
        })
    }

    /// The blobs that are devices, in the order of the device table: those of the layers, then the tree.
    pub fn devices(&self) -> impl Iterator<Item = &LayerRef> {
        self.layers.iter().chain(self.verity.iter().map(|verity| &verity.tree))
    }

    /// The manifest as JSON: same value, same bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut layers: Vec<Descriptor> = self.layers.iter().map(LayerRef::to_descriptor).collect();
        layers.extend(self.verity.as_ref().map(VerityRef::to_descriptor));
        layers.push(self.metadata.to_descriptor());
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MEDIA_TYPE_MANIFEST.to_owned()),
            config: self.config.clone(),
            layers,
            annotations: self.annotations.clone(),
        };
        serde_json::to_vec(&manifest).expect("strings, numbers and string maps always serialise")
    }
}

impl LayerRef {
    fn from_descriptor(descriptor: &Descriptor) -> Result<Self, Error> {
        let layer = descriptor.digest;
        if descriptor.media_type != MEDIA_TYPE_EROFS_ZSTD
            || descriptor.annotations.get(ANNOTATION_ROLE).map(String::as_str) != Some(ROLE_DEVICE)
        {
            return Err(not_ours(&format!("layer {layer} is not an EROFS device layer")));
        }
        check_size(descriptor, LAYER_BYTES_MAX)?;
        Ok(Self {
            digest: descriptor.digest,
            size_bytes: descriptor.size,
            index_range: range_annotation(descriptor, ANNOTATION_INDEX_RANGE)?,
            index_digest: digest_annotation(descriptor, ANNOTATION_INDEX_DIGEST)?,
            uncompressed_digest: digest_annotation(descriptor, ANNOTATION_UNCOMPRESSED_DIGEST)?,
            origin: LayerOrigin::from_descriptor(descriptor)?,
        })
    }

    fn to_descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(MEDIA_TYPE_EROFS_ZSTD, self.digest, self.size_bytes);
        let annotations = &mut descriptor.annotations;
        annotations.insert(ANNOTATION_ROLE.to_owned(), ROLE_DEVICE.to_owned());
        annotations.insert(ANNOTATION_INDEX_RANGE.to_owned(), range_text(&self.index_range));
        annotations.insert(ANNOTATION_INDEX_DIGEST.to_owned(), self.index_digest.to_string());
        annotations.insert(ANNOTATION_UNCOMPRESSED_DIGEST.to_owned(), self.uncompressed_digest.to_string());
        if let Some(origin) = &self.origin {
            origin.annotate(annotations);
        }
        descriptor
    }
}

impl VerityRef {
    fn from_descriptor(descriptor: &Descriptor) -> Result<Self, Error> {
        let tree = LayerRef::from_descriptor(descriptor)?;
        Ok(Self { tree, root: digest_annotation(descriptor, ANNOTATION_VERITY_ROOT)? })
    }

    fn to_descriptor(&self) -> Descriptor {
        let mut descriptor = self.tree.to_descriptor();
        descriptor.annotations.insert(ANNOTATION_VERITY_ROOT.to_owned(), self.root.to_string());
        descriptor
    }
}

impl LayerOrigin {
    /// `None` unless all is there: a blob whose making is half known is not used again.
    fn from_descriptor(descriptor: &Descriptor) -> Result<Option<Self>, Error> {
        let has = |key: &str| descriptor.annotations.contains_key(key);
        if ![ANNOTATION_DIFF_ID, ANNOTATION_SETTINGS, ANNOTATION_RECORD_DIGEST].into_iter().all(has) {
            return Ok(None);
        }
        let settings = annotation(descriptor, ANNOTATION_SETTINGS)?.to_owned();
        if settings.len() > SETTINGS_BYTES_MAX {
            let (layer, len) = (descriptor.digest, settings.len());
            return Err(invalid(&format!("layer {layer}: annotation {ANNOTATION_SETTINGS} of {len} bytes")));
        }
        let source_layer = has(ANNOTATION_SOURCE_LAYER).then(|| digest_annotation(descriptor, ANNOTATION_SOURCE_LAYER));
        Ok(Some(Self {
            source_layer: source_layer.transpose()?,
            diff_id: digest_annotation(descriptor, ANNOTATION_DIFF_ID)?,
            settings,
            record_digest: digest_annotation(descriptor, ANNOTATION_RECORD_DIGEST)?,
        }))
    }

    fn annotate(&self, annotations: &mut BTreeMap<String, String>) {
        if let Some(source) = &self.source_layer {
            annotations.insert(ANNOTATION_SOURCE_LAYER.to_owned(), source.to_string());
        }
        annotations.insert(ANNOTATION_DIFF_ID.to_owned(), self.diff_id.to_string());
        annotations.insert(ANNOTATION_SETTINGS.to_owned(), self.settings.clone());
        annotations.insert(ANNOTATION_RECORD_DIGEST.to_owned(), self.record_digest.to_string());
    }
}

impl MetadataRef {
    fn from_descriptor(descriptor: &Descriptor) -> Result<Self, Error> {
        if descriptor.annotations.contains_key(ANNOTATION_ROLE) {
            return Err(invalid("the last layer has a role, so nothing in it can be mounted"));
        }
        check_size(descriptor, METADATA_BYTES_MAX)?;
        Ok(Self {
            digest: descriptor.digest,
            size_bytes: descriptor.size,
            bundle_range: range_annotation(descriptor, ANNOTATION_BUNDLE_RANGE)?,
            uncompressed_digest: digest_annotation(descriptor, ANNOTATION_UNCOMPRESSED_DIGEST)?,
        })
    }

    fn to_descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(MEDIA_TYPE_EROFS_ZSTD, self.digest, self.size_bytes);
        let annotations = &mut descriptor.annotations;
        annotations.insert(ANNOTATION_BUNDLE_RANGE.to_owned(), range_text(&self.bundle_range));
        annotations.insert(ANNOTATION_UNCOMPRESSED_DIGEST.to_owned(), self.uncompressed_digest.to_string());
        descriptor
    }
}

/// Picks the EROFS manifest for `platform` out of an image index.
///
/// # Errors
/// [`ErrorKind::Invalid`] for malformed JSON, [`ErrorKind::NotOurs`] when the index lists ordinary manifests only,
/// [`ErrorKind::NotFound`] when it lists EROFS manifests, but none for `platform`.
pub fn choose(index_bytes: &[u8], platform: &Platform) -> Result<Descriptor, Error> {
    let index = Index::parse(index_bytes)?;
    let ours: Vec<(&Descriptor, &Platform)> = index
        .manifests
        .iter()
        // A profile is no image, whatever platform it states.
        .filter(|manifest| manifest.artifact_type.as_deref() != Some(profile::ARTIFACT_TYPE))
        .filter_map(|manifest| manifest.platform.as_ref().map(|platform| (manifest, platform)))
        .filter(|(_, have)| have.os_features.iter().any(|feature| feature == OS_FEATURE_EROFS))
        .collect();
    if ours.is_empty() {
        return Err(not_ours("the index lists ordinary manifests only"));
    }
    match ours.iter().find(|(_, have)| have.serves(platform)) {
        Some((manifest, _)) => Ok((*manifest).clone()),
        None => {
            let have: Vec<String> = ours.iter().map(|(_, have)| have.to_string()).collect();
            let message = format!("no image for {platform}; the index has {}", have.join(", "));
            Err(Error::new(ErrorKind::NotFound, message))
        }
    }
}

fn not_ours(why: &str) -> Error {
    Error::new(ErrorKind::NotOurs, format!("not an ublkimg image ({why}); run `ublkimg convert REF DST` first"))
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("bad ublkimg manifest: {why}"))
}

fn check_size(descriptor: &Descriptor, limit_bytes: u64) -> Result<(), Error> {
    if (1..=limit_bytes).contains(&descriptor.size) {
        return Ok(());
    }
    Err(invalid(&format!("layer {}: size {} is not within 1..={limit_bytes}", descriptor.digest, descriptor.size)))
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Result<&'a str, Error> {
    let missing = || invalid(&format!("layer {}: no annotation {key}", descriptor.digest));
    descriptor.annotations.get(key).map(String::as_str).ok_or_else(missing)
}

fn digest_annotation(descriptor: &Descriptor, key: &str) -> Result<Digest, Error> {
    let text = annotation(descriptor, key)?;
    text.parse().map_err(|error: Error| invalid(&format!("layer {}: annotation {key}: {error}", descriptor.digest)))
}

/// Reads `offset[:end]`; without an end the range goes to the end of the blob.
fn range_annotation(descriptor: &Descriptor, key: &str) -> Result<Range<u64>, Error> {
    let text = annotation(descriptor, key)?;
    let bad = || invalid(&format!("layer {}: annotation {key} {text:?} is not a range in the blob", descriptor.digest));
    let (start, end) = match text.split_once(':') {
        Some((start, end)) => (start, end.parse().map_err(|_| bad())?),
        None => (text, descriptor.size),
    };
    let start: u64 = start.parse().map_err(|_| bad())?;
    if start < end && end <= descriptor.size { Ok(start..end) } else { Err(bad()) }
}

fn range_text(range: &Range<u64>) -> String {
    format!("{}:{}", range.start, range.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{MEDIA_TYPE_CONFIG, MEDIA_TYPE_INDEX};

    fn digest(nibble: char) -> Digest {
        format!("sha256:{}", nibble.to_string().repeat(64)).parse().unwrap()
    }

    fn sample() -> ErofsManifest {
        ErofsManifest {
            config: Descriptor::new(MEDIA_TYPE_CONFIG, digest('c'), 20),
            layers: vec![LayerRef {
                digest: digest('1'),
                size_bytes: 100,
                index_range: 60..100,
                index_digest: digest('2'),
                uncompressed_digest: digest('3'),
                origin: Some(LayerOrigin {
                    source_layer: Some(digest('4')),
                    diff_id: digest('7'),
                    settings: "1 level-3".to_owned(),
                    record_digest: digest('8'),
                }),
            }],
            verity: None,
            metadata: MetadataRef {
                digest: digest('5'),
                size_bytes: 50,
                bundle_range: 10..50,
                uncompressed_digest: digest('6'),
            },
            annotations: BTreeMap::new(),
        }
    }

    fn error_of(manifest: &ErofsManifest) -> Error {
        ErofsManifest::parse(&manifest.to_bytes()).unwrap_err()
    }

    #[test]
    fn what_is_built_is_what_is_read() {
        assert_eq!(ErofsManifest::parse(&sample().to_bytes()).unwrap(), sample());
        assert_eq!(sample().to_bytes(), sample().to_bytes());
    }

    #[test]
    fn a_tree_is_read_and_is_no_layer() {
        let tree = LayerRef { digest: digest('9'), origin: None, ..sample().layers[0].clone() };
        let image = ErofsManifest { verity: Some(VerityRef { tree, root: digest('a') }), ..sample() };
        let read = ErofsManifest::parse(&image.to_bytes()).unwrap();
        assert_eq!((&read, read.layers.len(), read.devices().count()), (&image, 1, 2));
        let text = String::from_utf8(image.to_bytes()).unwrap();
        let unknown = ErofsManifest::parse(text.replace(ANNOTATION_VERITY_ROOT, "elsewhere").as_bytes()).unwrap();
        assert_eq!((unknown.layers.len(), unknown.verity), (2, None), "to others it is one device more");
        let bad = text.replace(&digest('a').to_string(), "sha256:0");
        assert_eq!(ErofsManifest::parse(bad.as_bytes()).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn an_ordinary_manifest_is_not_ours() {
        let text = String::from_utf8(sample().to_bytes()).unwrap();
        let ordinary = text.replace(MEDIA_TYPE_EROFS_ZSTD, "application/vnd.oci.image.layer.v1.tar+gzip");
        let error = ErofsManifest::parse(ordinary.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotOurs);
        assert!(error.to_string().contains("ublkimg convert REF DST"), "{error}");
        let no_role = text.replace(r#""org.erofs.role":"device","#, "");
        assert_eq!(ErofsManifest::parse(no_role.as_bytes()).unwrap_err().kind(), ErrorKind::NotOurs);
    }

    #[test]
    #[expect(clippy::reversed_empty_ranges, reason = "a manifest can claim one")]
    fn ranges_outside_the_blob_are_refused() {
        for range in [60..101, 60..60, 70..60] {
            let mut manifest = sample();
            manifest.layers[0].index_range = range;
            assert_eq!(error_of(&manifest).kind(), ErrorKind::Invalid);
        }
        let mut manifest = sample();
        manifest.metadata.bundle_range = 0..u64::MAX;
        assert_eq!(error_of(&manifest).kind(), ErrorKind::Invalid);
    }

    #[test]
    fn limits_hold() {
        let mut manifest = sample();
        manifest.layers = vec![manifest.layers[0].clone(); LAYERS_MAX + 1];
        assert_eq!(error_of(&manifest).kind(), ErrorKind::Invalid);
        let mut manifest = sample();
        manifest.metadata.size_bytes = METADATA_BYTES_MAX + 1;
        assert_eq!(error_of(&manifest).kind(), ErrorKind::Invalid);
        let mut manifest = sample();
        manifest.layers[0].size_bytes = 0;
        assert_eq!(error_of(&manifest).kind(), ErrorKind::Invalid);
        assert_eq!(ErofsManifest::parse(b"{").unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn an_image_without_layers_has_its_metadata_only() {
        let mut manifest = sample();
        manifest.layers.clear();
        assert_eq!(ErofsManifest::parse(&manifest.to_bytes()).unwrap(), manifest);
    }

    fn index(platforms: &[(&str, &[&str])]) -> Vec<u8> {
        let listed = |(position, (text, features)): (usize, &(&str, &[&str]))| {
            let mut descriptor = Descriptor::new(MEDIA_TYPE_MANIFEST, digest('a'), position as u64);
            let mut platform: Platform = text.parse().unwrap();
            platform.os_features = features.iter().map(|&feature| feature.to_owned()).collect();
            descriptor.platform = Some(platform);
            descriptor
        };
        let manifests = platforms.iter().enumerate().map(listed).collect();
        let media_type = Some(MEDIA_TYPE_INDEX.to_owned());
        serde_json::to_vec(&Index { schema_version: 2, media_type, manifests, annotations: BTreeMap::new() }).unwrap()
    }

    #[test]
    fn the_erofs_manifest_is_chosen_by_feature_and_platform() {
        let amd64 = Platform::new("linux", "amd64");
        let mixed = index(&[("linux/amd64", &[]), ("linux/arm64", &["erofs"]), ("linux/amd64", &["erofs"])]);
        assert_eq!(choose(&mixed, &amd64).unwrap().size, 2);
        let plain = index(&[("linux/amd64", &[])]);
        assert_eq!(choose(&plain, &amd64).unwrap_err().kind(), ErrorKind::NotOurs);
        let other = index(&[("linux/arm64", &["erofs"])]);
        let error = choose(&other, &amd64).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("linux/arm64"), "{error}");
    }
}
