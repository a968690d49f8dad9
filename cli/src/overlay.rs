//! A writable root over a mounted image, and how it goes.
//!
//! The image is mounted out of the way, below the run directory; an overlay of it and an upper directory is mounted where
//! the user wants it. What was made is written down before it is made, in `roots/NAME/made.json`: `rm` takes away what is
//! there of it, in the opposite order, also after a command that was killed half-way. The run directory is gone after a
//! reboot, as the mounts are.
//!
//! ```text
//! RUN/roots/NAME/made.json   what was made
//! RUN/roots/NAME/image       the EROFS
//! RUN/roots/NAME/scratch     a tmpfs with upper and work, unless the user names a directory for them
//! DIR                        the overlay
//! ```

use std::ffi::CString;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Deserialize, Serialize};
use ublkimg_driver::daemon::Directories;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::mounts;

/// What was made for a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// Where the overlay is mounted.
    pub(crate) root: PathBuf,
    /// It was made for it.
    pub(crate) made_root: bool,
    /// A bundle's configuration that was written beside it.
    pub(crate) config: Option<PathBuf>,
    /// Where the changes are kept, in `upper`, with `work` beside it for the kernel. If there is no such directory they are
    /// in memory, and end with the root.
    pub(crate) upper: Option<PathBuf>,
}

/// The place of a device's root below the run directory.
#[derive(Debug, Clone)]
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn of(directories: &Directories, name: &str) -> Self {
        Self(directories.run.join("roots").join(name))
    }

    /// Where the image itself is mounted.
    pub(crate) fn image(&self) -> PathBuf {
        self.0.join("image")
    }

    fn scratch(&self) -> PathBuf {
        self.0.join("scratch")
    }

    fn record(&self) -> PathBuf {
        self.0.join("made.json")
    }

    /// What was made here, if anything.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub(crate) fn made(&self) -> anyhow::Result<Option<Made>> {
        let path = self.record();
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).map_err(|error| {
                Error::caused(ErrorKind::Internal, format!("{} cannot be read", path.display()), error)
            })?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error).into()),
        }
    }

    /// Writes down what is about to be made. Root only: an upper directory's name may tell something.
    pub(crate) fn announce(&self, made: &Made) -> anyhow::Result<()> {
        let failed = |error| Error::io(format!("cannot write {}", self.record().display()), error);
        std::fs::create_dir_all(self.image()).map_err(failed)?;
        let draft = self.0.join("made.tmp");
        std::fs::write(&draft, serde_json::to_vec(made)?).map_err(failed)?;
        Ok(std::fs::rename(&draft, self.record()).map_err(failed)?)
    }

    /// Mounts the overlay, unless it is there already. The image is mounted at [`Self::image`].
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when something else is mounted there; when the kernel refuses.
    pub(crate) fn mount(&self, made: &Made) -> anyhow::Result<()> {
        if let Some(mounted) = mounts::at(&made.root)? {
            if self.is_ours(&mounted) {
                return Ok(());
            }
            let text = format!("{} is a mount point already: unmount it or choose another", made.root.display());
            return Err(Error::new(ErrorKind::Busy, text).into());
        }
        let changes = match &made.upper {
            Some(directory) => directory.clone(),
            None => {
                let scratch = self.scratch();
                std::fs::create_dir_all(&scratch)?;
                mount("tmpfs", &scratch, "mode=0755")?;
                scratch
            }
        };
        let (upper, work) = (changes.join("upper"), changes.join("work"));
        for directory in [&upper, &work] {
            std::fs::create_dir_all(directory)
                .map_err(|error| Error::io(format!("cannot create {}", directory.display()), error))?;
        }
        mount("overlay", &made.root, &options(&self.image(), &upper, &work)?)
    }

    /// The file system of the overlay, if it is mounted here.
    ///
    /// # Errors
    /// When the record or the mount table cannot be read.
    pub(crate) fn mounted(&self) -> anyhow::Result<Option<mounts::DeviceNumber>> {
        let Some(made) = self.made()? else { return Ok(None) };
        // A directory that is gone holds no mount.
        let mounted = mounts::at(&made.root).ok().flatten();
        Ok(mounted.filter(|mounted| self.is_ours(mounted)).map(|mounted| mounted.device))
    }

    fn is_ours(&self, mounted: &mounts::Mount) -> bool {
        let lower = format!("lowerdir={}", self.image().display());
        mounted.fs_type == "overlay" && mounted.super_options.split(',').any(|option| option == lower)
    }

    /// Takes away the overlay and the changes in memory, so that the image's device can go; a second time does nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when the root is in use, unless `force` is given.
    pub(crate) fn unmount(&self, force: bool) -> anyhow::Result<()> {
        let Some(made) = self.made()? else { return Ok(()) };
        if self.mounted()?.is_some() {
            unmount(&made.root, force)?;
        }
        if let Ok(Some(_)) = mounts::at(&self.scratch()) {
            unmount(&self.scratch(), force)?;
        }
        Ok(())
    }

    /// Takes away the directories and files, once nothing is mounted there.
    pub(crate) fn forget(&self) -> anyhow::Result<()> {
        let Some(made) = self.made()? else { return Ok(()) };
        // Never what is below: should a mount be left there, its files are not ours.
        if let Some(config) = &made.config {
            let _ = std::fs::remove_file(config);
        }
        if made.made_root {
            let _ = std::fs::remove_dir(&made.root);
            if made.config.is_some()
                && let Some(bundle) = made.root.parent()
            {
                let _ = std::fs::remove_dir(bundle);
            }
        }
        for directory in [self.scratch(), self.image()] {
            let _ = std::fs::remove_dir(directory);
        }
        std::fs::remove_file(self.record())?;
        let _ = std::fs::remove_dir(&self.0);
        Ok(())
    }
}

/// The options of an overlay. The kernel's syntax has no way to name a directory with these characters.
///
/// # Errors
/// [`ErrorKind::Invalid`] for a path with a comma, a colon or a backslash.
pub(crate) fn options(lower: &Path, upper: &Path, work: &Path) -> anyhow::Result<String> {
    for path in [lower, upper, work] {
        if path.to_str().is_none_or(|text| text.contains([',', ':', '\\'])) {
            let text = format!("{} cannot be part of an overlay: no comma, colon or backslash", path.display());
            return Err(Error::new(ErrorKind::Invalid, text).into());
        }
    }
    Ok(format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display()))
}

/// Mounts a file system that has no device.
pub(crate) fn mount(kind: &str, target: &Path, options: &str) -> anyhow::Result<()> {
    let data = CString::new(options)?;
    rustix::mount::mount(kind, target, kind, MountFlags::empty(), Some(data.as_c_str())).map_err(|errno| {
        let what = format!("cannot mount {kind} on {} with {options}", target.display());
        let kind = if errno == rustix::io::Errno::NODEV { ErrorKind::Unsupported } else { ErrorKind::Io };
        Error::caused(kind, what, std::io::Error::from(errno)).into()
    })
}

fn unmount(directory: &Path, force: bool) -> anyhow::Result<()> {
    let flags = if force { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    rustix::mount::unmount(directory, flags).map_err(|errno| {
        let (kind, hint) = match errno {
            rustix::io::Errno::BUSY => (ErrorKind::Busy, ": it is in use, end that first or use --force"),
            _ => (ErrorKind::Io, ""),
        };
        let what = format!("cannot unmount {}{hint}", directory.display());
        Error::caused(kind, what, std::io::Error::from(errno)).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_an_overlay_cannot_name_are_refused() {
        let good = Path::new("/a b/ü");
        assert_eq!(options(good, good, Path::new("/w")).unwrap(), "lowerdir=/a b/ü,upperdir=/a b/ü,workdir=/w");
        for bad in ["/a,b", "/a:b", "/a\\b"] {
            assert!(options(good, Path::new(bad), good).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_was_made_is_known_and_forgotten() {
        let run = tempfile::tempdir().unwrap();
        let directories = Directories { root: run.path().join("store"), run: run.path().to_owned() };
        let place = Place::of(&directories, "x");
        assert_eq!(place.made().unwrap(), None);
        place.forget().unwrap();
        let root = run.path().join("bundle/rootfs");
        std::fs::create_dir_all(&root).unwrap();
        let config = run.path().join("bundle/config.json");
        std::fs::write(&config, "{}").unwrap();
        let made = Made { root: root.clone(), made_root: true, config: Some(config), upper: None };
        place.announce(&made).unwrap();
        assert_eq!(place.made().unwrap(), Some(made));
        place.forget().unwrap();
        assert!(!root.parent().unwrap().exists());
        assert_eq!(place.made().unwrap(), None);
    }
}
