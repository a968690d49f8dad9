//! What a server that was killed left in directories of the daemon: half-written device records, and mount points of the
//! FUSE transport, on which nothing is mounted any more. (What it left in the store, the store removes.)
//!
//! Only for the server that owns the store: what others are at work on looks the same.

use std::fs;
use std::path::{Path, PathBuf};

use super::Directories;
use super::state::is_half_written;

/// Removes it. What cannot be removed is in nobody's way: that is logged.
pub(super) fn remove(directories: &Directories) {
    for path in entries(&directories.devices()).filter(|path| is_half_written(path)) {
        log(&path, fs::remove_file(&path));
    }
    for device in entries(&directories.fuse()) {
        // Files of others are not touched: only empty directories go.
        for mount_point in entries(&device) {
            log(&mount_point, fs::remove_dir(&mount_point));
        }
        log(&device, fs::remove_dir(&device));
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn log(path: &Path, removed: std::io::Result<()>) {
    match removed {
        Ok(()) => tracing::info!(path = %path.display(), "removed what a killed server left"),
        Err(error) => tracing::warn!(path = %path.display(), "what a killed server left stays: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_written_records_and_empty_mount_points_go_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories { root: root.path().join("root"), run: root.path().join("run") };
        directories.create().unwrap();
        let (records, fuse) = (directories.devices(), directories.fuse());
        let mount_points = ["a", "b"].map(|name| fuse.join(name).join("fuse"));
        for mount_point in &mount_points {
            fs::create_dir_all(mount_point).unwrap();
        }
        fs::write(mount_points[1].join("file"), "somebody's").unwrap();
        for name in [".a.new", "a.json", "new"] {
            fs::write(records.join(name), "{}").unwrap();
        }
        remove(&directories);
        let mut left: Vec<_> = entries(&records).chain(entries(&fuse)).collect();
        left.sort();
        let mut expected = vec![records.join("a.json"), records.join("new"), fuse.join("b")];
        expected.sort();
        assert_eq!(left, expected);
        assert!(mount_points[1].join("file").exists());
    }
}
