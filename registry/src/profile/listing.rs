//! Profiles as an index or a list of referrers names them, and the choice of one.

use std::fmt;
use std::str::FromStr;

use super::{ANNOTATION_COMMAND, ANNOTATION_DEFAULT, ANNOTATION_MANIFEST, ANNOTATION_NAME, ARTIFACT_TYPE, check_name};
use crate::descriptor::{Descriptor, Index};
use crate::{Digest, Error, ErrorKind};

/// What a profile may do, by where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// What the user named covers it: the index lists it, or its digest was given. Its hot blob may be served.
    Bytes,
    /// Anybody who may push into the repository could have put it there: it may change the order in which verified chunks
    /// are fetched, never a byte; its hot blob is not used.
    Order,
}

/// A profile that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedProfile {
    /// The descriptor of its manifest; may carry it inside.
    pub descriptor: Descriptor,
    /// Digest of the command that it was recorded with.
    pub command: Option<Digest>,
    /// What the user calls it.
    pub name: Option<String>,
    /// Whether it serves commands that have no profile of their own.
    pub is_default: bool,
    /// What it may do.
    pub trust: Trust,
}

impl ListedProfile {
    /// Reads the descriptor of a profile of the image manifest `image`; `None` when it is something else. What is
    /// malformed in the annotations counts as not said.
    pub(crate) fn of(descriptor: &Descriptor, image: &Digest, trust: Trust) -> Option<Self> {
        if descriptor.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return None;
        }
        let note = |key: &str| descriptor.annotations.get(key);
        let is_of_image = match note(ANNOTATION_MANIFEST) {
            Some(text) => text.parse::<Digest>().is_ok_and(|digest| digest == *image),
            // A registry that lists referrers knows the image and copies the manifest's own annotations only.
            None => trust == Trust::Order,
        };
        is_of_image.then(|| Self {
            command: note(ANNOTATION_COMMAND).and_then(|text| text.parse().ok()),
            name: note(ANNOTATION_NAME).filter(|name| check_name(name).is_ok()).cloned(),
            is_default: note(ANNOTATION_DEFAULT).is_some_and(|text| text == "true"),
            descriptor: descriptor.clone(),
            trust,
        })
    }

    /// Whether the two answer to the same choice, so that one takes the other's place.
    pub(super) fn rivals(&self, other: &Self) -> bool {
        let same = |a: bool, b: bool| a && b;
        self.descriptor.digest == other.descriptor.digest
            || same(self.command.is_some(), self.command == other.command)
            || same(self.name.is_some(), self.name == other.name)
    }
}

/// The profiles of the image manifest `image` that its index lists, in the index's order. The digest of the index covers
/// them.
///
/// # Errors
/// [`ErrorKind::Invalid`] for malformed JSON.
pub fn profiles(index_bytes: &[u8], image: &Digest) -> Result<Vec<ListedProfile>, Error> {
    let index = Index::parse(index_bytes)?;
    Ok(index.manifests.iter().filter_map(|entry| ListedProfile::of(entry, image, Trust::Bytes)).collect())
}

/// Which profile a user wants: `--profile`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProfileChoice {
    /// The one of the command, else the default, else none.
    #[default]
    Auto,
    /// None.
    None,
    /// The one with this name.
    Name(String),
    /// The one whose manifest has this digest, wherever it is listed.
    Digest(Digest),
}

impl FromStr for ProfileChoice {
    type Err = Error;

    /// Reads `auto`, `none`, a digest or a name.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            _ if text.starts_with("sha256:") => text.parse().map(Self::Digest),
            _ => check_name(text).map(|()| Self::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for ProfileChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::None => formatter.write_str("none"),
            Self::Name(name) => formatter.write_str(name),
            Self::Digest(digest) => digest.fmt(formatter),
        }
    }
}

/// Picks a profile; `command` is the digest of the command that is to run. Of several that fit, the first.
///
/// # Errors
/// [`ErrorKind::NotFound`] when a name or digest was asked for that is not listed.
pub fn choose_profile<'a>(
    listed: &'a [ListedProfile],
    choice: &ProfileChoice,
    command: Option<&Digest>,
) -> Result<Option<&'a ListedProfile>, Error> {
    let found = match choice {
        ProfileChoice::None => return Ok(None),
        ProfileChoice::Auto => {
            let exact = listed.iter().find(|profile| command.is_some() && profile.command.as_ref() == command);
            return Ok(exact.or_else(|| listed.iter().find(|profile| profile.is_default)));
        }
        ProfileChoice::Name(name) => listed.iter().find(|profile| profile.name.as_ref() == Some(name)),
        ProfileChoice::Digest(digest) => listed.iter().find(|profile| profile.descriptor.digest == *digest),
    };
    found.map(Some).ok_or_else(|| {
        let names: Vec<&str> = listed.iter().filter_map(|profile| profile.name.as_deref()).collect();
        let have = if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") };
        Error::new(ErrorKind::NotFound, format!("the image has no profile {choice}; it has {have}"))
    })
}
