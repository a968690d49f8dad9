//! Bundles: what an OCI runtime (runc, crun) runs.

pub(crate) mod accounts;
pub(crate) mod image_config;
pub(crate) mod spec;

use std::path::Path;

use ublkimg_driver::error::Error;

pub(crate) use image_config::ImageConfig;
pub(crate) use spec::{BindMount, Hooks, Overrides};

/// Writes the configuration of the bundle at `directory`, whose `rootfs` is mounted; makes the image's volumes there.
///
/// # Errors
/// When there is no command or no such user, or a file cannot be written.
pub(crate) fn write(directory: &Path, image: &ImageConfig, overrides: &Overrides) -> anyhow::Result<()> {
    let rootfs = directory.join("rootfs");
    let spec = spec::spec(image, &rootfs, overrides)?;
    for volume in image.volumes() {
        make_directory(&rootfs, volume)?;
    }
    let path = directory.join("config.json");
    let written = std::fs::write(&path, serde_json::to_vec_pretty(&spec)?);
    written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?;
    Ok(())
}

/// Makes a directory of a tree, and its parents. Links in the tree never lead out of it.
pub(crate) fn make_directory(rootfs: &Path, path: &str) -> anyhow::Result<()> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let failed = |errno: rustix::io::Errno| {
        Error::io(format!("cannot make {path} in {}", rootfs.display()), std::io::Error::from(errno))
    };
    let root = rustix::fs::openat(CWD, rootfs, flags, Mode::empty()).map_err(failed)?;
    let mut done = std::path::PathBuf::new();
    for part in Path::new(path).components() {
        let std::path::Component::Normal(part) = part else { continue };
        let parent = if done.as_os_str().is_empty() { Path::new(".") } else { &done };
        let parent = rustix::fs::openat2(&root, parent, flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(failed)?;
        match rustix::fs::mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(failed(errno).into()),
        }
        done.push(part);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_stay_within_the_root() {
        let place = tempfile::tempdir().unwrap();
        let (root, outside) = (place.path().join("root"), place.path().join("outside"));
        std::fs::create_dir_all(root.join("outside")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink("/outside", root.join("var")).unwrap();
        make_directory(&root, "/var/lib/../data").unwrap();
        assert!(root.join("outside/lib/data").is_dir());
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }
}
