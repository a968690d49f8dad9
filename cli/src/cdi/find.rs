//! Specifications on this host. Of two that have a device, the one in the later directory counts: what a driver writes at boot
//! (`/var/run/cdi`) is newer than what an administrator keeps (`/etc/cdi`). Two in one directory are an error.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use ublkimg_driver::error::{Error, ErrorKind, Result};

use super::{DeviceName, Edits, Specification};

/// Specifications of a host with many GPUs and their divisions have some 100 KiB.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// A directory with more files than this is not one of specifications.
const FILES_MAX: usize = 1024;

/// What the devices change in a container's configuration, in the order in which it is to be made.
///
/// # Errors
/// `NotFound` for a device that no file has, with what was wrong with the files that could not be read; `Invalid` when two
/// files have it.
pub(crate) fn find(directories: &[PathBuf], devices: &[DeviceName]) -> Result<Vec<Edits>> {
    let mut found = Vec::new();
    let mut begun = BTreeSet::new();
    for device in devices {
        let (path, specification) = file_of(directories, device)?;
        // Those of the file once, however many of its devices are wanted.
        if begun.insert(path) {
            found.push(specification.container_edits.clone());
        }
        let edits = specification.devices.into_iter().filter(|one| one.name == device.name);
        found.extend(edits.map(|one| one.container_edits));
    }
    Ok(found)
}

fn file_of(directories: &[PathBuf], device: &DeviceName) -> Result<(PathBuf, Specification)> {
    let mut unread = Vec::new();
    for directory in directories.iter().rev() {
        let mut having = Vec::new();
        for path in files(directory)? {
            match read(&path) {
                Ok(file) if file.kind == device.kind && file.devices.iter().any(|one| one.name == device.name) => {
                    having.push((path, file));
                }
                Ok(_) => {}
                Err(error) => unread.push(error.to_string()),
            }
        }
        if having.len() > 1 {
            let text = format!("device {device} is in {} and in {}", having[0].0.display(), having[1].0.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if let Some(found) = having.pop() {
            return Ok(found);
        }
    }
    let places: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
    let unread = unread.first().map_or_else(String::new, |error| format!("; {error}"));
    let text = format!("no CDI specification in {} has device {device}{unread}", places.join(", "));
    Err(Error::new(ErrorKind::NotFound, text))
}

/// In the order of their names; none where there is no directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::path("read", directory, error)),
    };
    let is_ours = |path: &PathBuf| path.extension().is_some_and(|end| end == "json" || end == "yaml" || end == "yml");
    let mut paths: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_ours).take(FILES_MAX).collect();
    paths.sort();
    Ok(paths)
}

/// YAML, of which JSON is a part.
fn read(path: &Path) -> Result<Specification> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| Error::path("read", path, error))?;
    file.take(FILE_MAX_BYTES).read_to_string(&mut text).map_err(|error| Error::path("read", path, error))?;
    let is_json = path.extension().is_some_and(|end| end == "json");
    let parsed = match is_json {
        true => serde_json::from_str(&text).map_err(|error| error.to_string()),
        false => serde_saphyr::from_str(&text).map_err(|error| error.to_string()),
    };
    parsed.map_err(|error| {
        let line = error.lines().next().unwrap_or_default();
        Error::new(ErrorKind::Invalid, format!("{} is no CDI specification: {line}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATIC: &str = r#"{
        "cdiVersion": "0.6.0", "kind": "vendor.com/gpu",
        "containerEdits": {"env": ["ALL=1"]},
        "devices": [{"name": "0", "containerEdits": {"env": ["ONE=0"]}}, {"name": "1", "containerEdits": {"env": ["ONE=1"]}}]
    }"#;
    const DYNAMIC: &str =
        "cdiVersion: '0.6.0'\nkind: vendor.com/gpu\ndevices:\n- name: '1'\n  containerEdits:\n    env: [NEWER=1]\n";

    fn device(text: &str) -> DeviceName {
        text.parse().unwrap()
    }

    #[test]
    fn the_later_directory_counts_and_a_file_s_own_edits_are_made_once() {
        let place = tempfile::tempdir().unwrap();
        let directories = ["etc", "run", "none"].map(|name| place.path().join(name));
        for (directory, name, text) in [(0, "a.json", STATIC), (1, "b.yaml", DYNAMIC)] {
            std::fs::create_dir_all(&directories[directory]).unwrap();
            std::fs::write(directories[directory].join(name), text).unwrap();
        }
        std::fs::write(directories[0].join("notes.txt"), "{").unwrap();
        let env = |names: &[&str]| -> Vec<String> {
            let names: Vec<_> = names.iter().map(|name| device(name)).collect();
            find(&directories, &names).unwrap().into_iter().flat_map(|edits| edits.env).collect()
        };
        assert_eq!(env(&["vendor.com/gpu=0", "vendor.com/gpu=1"]), ["ALL=1", "ONE=0", "NEWER=1"]);
        std::fs::remove_file(directories[1].join("b.yaml")).unwrap();
        assert_eq!(env(&["vendor.com/gpu=0", "vendor.com/gpu=1"]), ["ALL=1", "ONE=0", "ONE=1"]);
        std::fs::write(directories[0].join("c.json"), STATIC).unwrap();
        let twice = find(&directories, &[device("vendor.com/gpu=0")]).unwrap_err();
        assert!(twice.to_string().contains("a.json") && twice.to_string().contains("c.json"), "{twice}");
    }

    #[test]
    fn a_device_that_is_not_there_is_named_with_what_could_not_be_read() {
        let place = tempfile::tempdir().unwrap();
        let unknown = "{\"cdiVersion\": \"1.1.0\", \"kind\": \"v.com/net\", \"devices\": [{\"name\": \"0\", \"containerEdits\": {\"netDevices\": []}}]}";
        std::fs::write(place.path().join("net.json"), unknown).unwrap();
        let error = find(&[place.path().to_owned()], &[device("v.com/net=0")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        for word in ["v.com/net=0", "net.json", "netDevices"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
