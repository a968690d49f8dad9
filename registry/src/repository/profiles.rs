//! Profiles of an image: found, fetched, pushed. What they are and what they may do is in [`crate::profile`].

use bytes::Bytes;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use super::{Inner, Repository, Resolved, blocking};
use crate::blob::BlobSource;
use crate::descriptor::{Descriptor, MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform};
use crate::digest::Digest;
use crate::erofs_manifest::ErofsManifest;
use crate::error::{Error, ErrorKind, Result};
use crate::profile::{
    ARTIFACT_TYPE, ListedProfile, ProfileChoice, ProfileManifest, Trust, add_to_index, choose_profile, index_around,
    profiles,
};

/// How often the index under a tag is written when others write it at the same time.
const WRITE_ATTEMPTS: usize = 4;

/// A profile to push.
#[derive(Debug, Clone)]
pub struct NewProfile {
    /// Its manifest.
    pub manifest: ProfileManifest,
    /// The bytes of the trace.
    pub trace: Bytes,
    /// The bytes of the hot blob, when the manifest names one.
    pub hot: Option<BlobSource>,
}

/// A profile that is in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushedProfile {
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Digest of the index that lists it, which the image's tag now names.
    pub index: Digest,
}

impl Repository {
    /// The profile of the image manifest `image` that the user wants; `index` is the index that the reference resolved to,
    /// if it did not name the manifest itself. `auto` looks only there and sends nothing; a name is looked for among the
    /// referrers next; a digest is fetched wherever it is listed.
    ///
    /// # Errors
    /// `NotFound` when there is no profile with this name or digest; `Invalid` for a malformed index; and those of the
    /// connection.
    pub async fn find_profile(
        &self,
        index: Option<&[u8]>,
        image: &Digest,
        choice: &ProfileChoice,
        command: Option<&Digest>,
    ) -> Result<Option<ListedProfile>> {
        let mut listed = index.map_or_else(|| Ok(Vec::new()), |index| profiles(index, image))?;
        let not_listed = match choose_profile(&listed, choice, command) {
            Ok(found) => return Ok(found.cloned()),
            Err(error) => error,
        };
        match choice {
            ProfileChoice::Digest(digest) => {
                let bytes = self.manifest(digest).await?;
                let manifest = ProfileManifest::parse(&bytes)?;
                Ok(Some(ListedProfile {
                    descriptor: Descriptor::of_inline(MEDIA_TYPE_MANIFEST, &bytes),
                    command: manifest.command,
                    name: manifest.name,
                    is_default: false,
                    trust: Trust::Bytes,
                }))
            }
            ProfileChoice::Name(_) => {
                listed.extend(self.profile_referrers(image).await?);
                Ok(choose_profile(&listed, choice, command)?.cloned())
            }
            ProfileChoice::Auto | ProfileChoice::None => Err(not_listed),
        }
    }

    /// The profiles that hang on the image manifest `image` as referrers.
    ///
    /// # Errors
    /// As [`Repository::referrers`].
    pub async fn profile_referrers(&self, image: &Digest) -> Result<Vec<ListedProfile>> {
        let listed = self.referrers(image, Some(ARTIFACT_TYPE)).await?;
        Ok(listed.iter().filter_map(|entry| ListedProfile::of(entry, image, Trust::Order)).collect())
    }

    /// The manifest of a profile: out of its descriptor, or with one request.
    ///
    /// # Errors
    /// `Invalid` when it is for another image than `image`; what [`ProfileManifest::parse`] refuses; and those of the
    /// connection.
    pub async fn fetch_profile(&self, listed: &ListedProfile, image: &Digest) -> Result<ProfileManifest> {
        let descriptor = &listed.descriptor;
        let bytes = match descriptor.inline()? {
            Some(bytes) => bytes,
            None => self.manifest(&descriptor.digest).await?,
        };
        let manifest = ProfileManifest::parse(&bytes)?;
        if manifest.subject.digest != *image {
            let (profile, other) = (descriptor.digest, manifest.subject.digest);
            return Err(Error::invalid(format!("profile {profile} is for image {other}, not for {image}")));
        }
        Ok(manifest)
    }

    /// The trace of a profile, verified: out of the manifest, or with one request.
    ///
    /// # Errors
    /// `Corrupt` for other bytes; and those of the connection.
    pub async fn fetch_trace(&self, manifest: &ProfileManifest) -> Result<Bytes> {
        self.content(&manifest.trace).await
    }

    /// Pushes a profile and lists it in the index under the image's tag. A tag that names the image's manifest itself names
    /// an index with both afterwards. Layers are neither read nor written. Pushing it again changes nothing.
    ///
    /// Others who write the tag at the same moment can be overwritten, or overwrite this; what was written is read again, and
    /// written again if it went lost.
    ///
    /// # Errors
    /// `Invalid` when the location is a digest, or the tag is not that of the profile's image; and those of the connection.
    pub async fn push_profile(&self, profile: &NewProfile, is_default: bool) -> Result<PushedProfile> {
        let tag = self.tag_to_push().await?;
        let image = &profile.manifest.subject;
        // First of all: is it the right tag?
        let bytes = profile.manifest.to_bytes()?;
        add_to_index(&self.index_of_tag(image).await?, &bytes, is_default)?;
        let manifest = self.push_profile_referrer(profile).await?;
        for _ in 0..WRITE_ATTEMPTS {
            let (resolved, before) = self.resolved_index(image).await?;
            let after = add_to_index(&before, &bytes, is_default)?;
            if after == resolved.bytes {
                return Ok(PushedProfile { manifest, index: resolved.digest });
            }
            self.push_index(&resolved, after, tag.clone()).await?;
        }
        Err(Error::unavailable("others keep changing the tag that the profile is to be listed under"))
    }

    /// Pushes a profile that hangs on the image as a referrer, and is listed nowhere else.
    ///
    /// # Errors
    /// Those of the connection; what [`ProfileManifest::parse`] refuses.
    pub async fn push_profile_referrer(&self, profile: &NewProfile) -> Result<Digest> {
        let manifest = &profile.manifest;
        let bytes = manifest.to_bytes()?;
        let config = manifest.config();
        let inside = BlobSource::Bytes(manifest.config_bytes());
        self.push_blob(&config.digest, config.size, inside, None).await?;
        self.push_blob(&manifest.trace.digest, manifest.trace.size, BlobSource::Bytes(profile.trace.clone()), None)
            .await?;
        match (&manifest.hot, &profile.hot) {
            (Some(hot), Some(source)) => {
                self.push_blob(&hot.blob.digest, hot.blob.size, source.clone(), None).await?;
            }
            (None, None) => {}
            _ => return Err(Error::invalid("a hot blob without its bytes, or bytes without a hot blob")),
        }
        self.push_referrer(bytes).await
    }

    /// Puts an index in the place of what the location named before.
    async fn push_index(&self, before: &Resolved, index: Bytes, tag: Option<String>) -> Result<Digest> {
        let media_type = if is_index(before) { before.media_type.clone() } else { MEDIA_TYPE_INDEX.to_owned() };
        match self.inner()? {
            Inner::Layout(layout) => {
                let old = before.digest;
                blocking(layout, move |layout| layout.push_instead(&media_type, &index, tag.as_deref(), Some(&old)))
                    .await
            }
            Inner::Remote(remote) => remote.registry().push_manifest(&media_type, index, tag.as_deref()).await,
        }
    }

    async fn index_of_tag(&self, image: &Descriptor) -> Result<Bytes> {
        self.resolved_index(image).await.map(|(_, index)| index)
    }

    /// What the location names, and the index that it is or that belongs around it.
    async fn resolved_index(&self, image: &Descriptor) -> Result<(Resolved, Bytes)> {
        let resolved = self.without_mirrors().resolve().await?;
        if is_index(&resolved) {
            let index = resolved.bytes.clone();
            return Ok((resolved, index));
        }
        if resolved.digest != image.digest {
            let (tagged, image) = (resolved.digest, image.digest);
            return Err(Error::invalid(format!("the tag names {tagged}; the profile is for {image}")));
        }
        let platform = self.platform(&resolved.bytes).await?;
        let listed = Descriptor::of(&resolved.media_type, &resolved.bytes);
        let index = index_around(listed, &platform)?;
        Ok((resolved, index))
    }

    /// What the config of an image says that it runs on.
    async fn platform(&self, manifest: &[u8]) -> Result<Platform> {
        #[derive(Deserialize)]
        struct Config {
            os: String,
            architecture: String,
            #[serde(default)]
            variant: Option<String>,
        }
        let config = ErofsManifest::parse(manifest)?.config;
        let bytes = self.content(&config).await?;
        let config: Config = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(ErrorKind::Invalid, format!("config of the image: {error}")))?;
        Ok(Platform { variant: config.variant, ..Platform::new(&config.os, &config.architecture) })
    }

    /// Small content, verified; its size is bounded by who read the descriptor.
    async fn content(&self, descriptor: &Descriptor) -> Result<Bytes> {
        if let Some(bytes) = descriptor.inline()? {
            return Ok(bytes);
        }
        let mut bytes = Vec::new();
        let mut reader = self.blob(&descriptor.digest, descriptor.size).await?;
        match reader.read_to_end(&mut bytes).await {
            Ok(_) => Ok(bytes.into()),
            Err(error) => {
                Err(error.downcast().unwrap_or_else(|error| Error::io(format!("blob {}", descriptor.digest), error)))
            }
        }
    }

    async fn tag_to_push(&self) -> Result<Option<String>> {
        match self.inner()? {
            Inner::Layout(layout) => blocking(layout, crate::layout::Layout::tag_of_image).await,
            Inner::Remote(remote) => match remote.registry().tag() {
                Some(tag) => Ok(Some(tag.to_owned())),
                None => {
                    Err(Error::invalid("a profile is listed under a tag; name the image by its tag, not by a digest"))
                }
            },
        }
    }
}

fn is_index(resolved: &Resolved) -> bool {
    matches!(resolved.media_type.as_str(), MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_LIST)
}
