//! Device records: what a server that is started again must know to take its devices back.
//!
//! One JSON file a device under `<root>/devices`, written to a temporary name and renamed before the device starts, removed
//! after it is gone. The kernel keeps none of this. Nobody waits for the disk: after a power cut there is no device whose
//! record could be missed, and an empty file that is left of one is removed. Records hold no secrets: credentials are read
//! again from where they came.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::protocol::StartOptions;
use crate::attach::KeptProfile;
use crate::device::Transport;
use crate::error::{Error, ErrorKind, Result};

/// A record file may have this many bytes; a larger one was not written by us.
const RECORD_MAX_BYTES: u64 = 1 << 20;

/// What is kept of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The device's name, also the file's.
    pub name: String,
    /// The reference given to `add`.
    pub reference: String,
    /// Digest of the image manifest that is served.
    pub manifest: String,
    /// How it is served; never `Auto`.
    pub transport: Transport,
    /// The kernel's number of the ublk device; none for FUSE.
    pub ublk_id: Option<u32>,
    /// See [`super::protocol::AddRequest::plain_http`].
    pub plain_http: bool,
    /// See [`super::protocol::AddRequest::auth_file`].
    pub auth_file: Option<PathBuf>,
    /// See [`super::protocol::AddRequest::credential_files`]. Older records lack it: then the server looks where it would itself.
    #[serde(default)]
    pub credential_files: Vec<PathBuf>,
    /// See [`super::protocol::AddRequest::hosts_dirs`]. Records of version 0.1.0 lack it.
    #[serde(default)]
    pub hosts_dirs: Vec<PathBuf>,
    /// See [`super::protocol::AddRequest::read_timeout_ms`].
    pub read_timeout_ms: u64,
    /// See [`super::protocol::AddRequest::holds_reads`]. Records of version 0.1.0 lack it.
    #[serde(default)]
    pub holds_reads: bool,
    /// What it was started with. Records of version 0.1.0 lack it.
    #[serde(default)]
    pub profile: Option<KeptProfile>,
    /// See [`super::protocol::AddRequest::start`]. Records of version 0.1.0 lack it.
    #[serde(default)]
    pub start: StartOptions,
    /// Mount points made by `add --mount`.
    pub mounts: Vec<PathBuf>,
    /// The boot in which the device was made: after a reboot it is gone and must be made anew.
    pub boot_id: String,
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Records in `directory`, which exists.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// Writes or replaces a record; when it returns the record survives this process.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::NoSpace`], naming the file.
    pub fn write(&self, record: &DeviceRecord) -> Result<()> {
        let path = self.path(&record.name);
        let temporary = self.directory.join(format!(".{}.new", record.name));
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(|error| Error::caused(ErrorKind::Internal, format!("record of {}", record.name), error))?;
        let written = fs::write(&temporary, &bytes).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            Error::io(format!("cannot write {}", path.display()), error)
        })
    }

    /// Removes a record; one that is not there is no error.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], naming the file.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// All records, by name. A file that cannot be read as a record is reported in the log and left alone; an empty one is
    /// what a power cut left, and removed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the directory cannot be listed; one that does not exist has no records.
    pub fn read_all(&self) -> Result<Vec<DeviceRecord>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(format!("cannot list {}", self.directory.display()), error)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io(format!("cannot list {}", self.directory.display()), error))?;
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            if entry.metadata().is_ok_and(|metadata| metadata.len() == 0) {
                tracing::warn!(path = %path.display(), "an empty device record is removed: the power was cut");
                let _ = fs::remove_file(&path);
                continue;
            }
            match read_record(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(path = %path.display(), "device record ignored: {error}"),
            }
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }
}

/// Whether a file of that name is one that [`Records::write`] did not come to rename.
pub(super) fn is_half_written(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_prefix('.')).is_some_and(|name| name.ends_with(".new"))
}

fn read_record(path: &Path) -> std::result::Result<DeviceRecord, Box<dyn std::error::Error>> {
    let len_bytes = fs::metadata(path)?.len();
    if len_bytes > RECORD_MAX_BYTES {
        return Err(format!("{len_bytes} bytes is too long for a record").into());
    }
    let record: DeviceRecord = serde_json::from_slice(&fs::read(path)?)?;
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(record.name.as_str()) {
        return Err("the file's name is not the record's".into());
    }
    Ok(record)
}

/// The kernel's id of this boot.
///
/// # Errors
/// [`ErrorKind::Io`] without `/proc`.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|error| Error::io(format!("cannot read {path}"), error))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use ublkimg_tests::fault_row::FaultRow;

    use super::*;

    fn record(name: &str) -> DeviceRecord {
        DeviceRecord {
            name: name.into(),
            reference: "127.0.0.1:5000/app:1".into(),
            manifest: "sha256:00".into(),
            transport: Transport::Ublk,
            ublk_id: Some(3),
            plain_http: false,
            auth_file: None,
            credential_files: vec!["/etc/docker/config.json".into()],
            hosts_dirs: Vec::new(),
            read_timeout_ms: 300_000,
            holds_reads: false,
            profile: None,
            start: StartOptions::default(),
            mounts: vec!["/mnt/a".into()],
            boot_id: "b".into(),
        }
    }

    #[test]
    fn records_come_back_sorted_and_can_be_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_path_buf());
        records.write(&record("b")).unwrap();
        records.write(&record("a")).unwrap();
        let changed = DeviceRecord { mounts: Vec::new(), ..record("b") };
        records.write(&changed).unwrap();
        assert_eq!(records.read_all().unwrap(), vec![record("a"), changed]);
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert_eq!(records.read_all().unwrap().len(), 1);
    }

    #[test]
    fn a_record_cut_short_or_under_another_name_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_path_buf());
        records.write(&record("good")).unwrap();
        let bytes = fs::read(dir.path().join("good.json")).unwrap();
        fs::write(dir.path().join("cut.json"), &bytes[..bytes.len() / 2]).unwrap();
        fs::write(dir.path().join("other.json"), &bytes).unwrap();
        fs::write(dir.path().join(".x.new"), b"").unwrap();
        fs::write(dir.path().join("empty.json"), b"").unwrap();
        let fault = FaultRow::begins("a device record that was cut short");
        let names: Vec<_> = records.read_all().unwrap().into_iter().map(|r| r.name).collect();
        fault.ends("reported, left alone");
        assert_eq!(names, ["good"]);
        assert!(!dir.path().join("empty.json").exists());
    }

    #[test]
    fn no_directory_means_no_records() {
        assert!(Records::new("/nonexistent/devices".into()).read_all().unwrap().is_empty());
    }
}
