//! Device records: what a server that is started again must know to take its devices back.
//!
//! One JSON file a device under `<root>/devices`, written to a temporary name and renamed before the device starts, removed
//! after it is gone. The kernel keeps none of this. Nobody waits for the disk: after a power cut there is no device whose
//! record could be missed, and an empty file that is left of one is removed. Records hold no secrets: credentials are read
//! again from where they came.
//!
//! A record that this version cannot read, since it was cut short or has fields of a later one, still says which device
//! waits for a server that cannot come ([`Unreadable::claim`]).

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::protocol::StartOptions;
use crate::attach::KeptProfile;
use crate::device::Transport;
use crate::device::ublk::Claim;
use crate::error::{Error, ErrorKind, Result};

/// A record file may have this many bytes; a larger one was not written by us.
const RECORD_MAX_BYTES: u64 = 1 << 20;

/// What is kept of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The device's name, also the file's.
    pub name: String,
    /// The kernel's number of the ublk device; none for FUSE.
    pub ublk_id: Option<u32>,
    /// The process that added the ublk device. Records of version 0.1.0 lack it.
    #[serde(default)]
    pub creator_pid: Option<u32>,
    /// The boot in which the device was made: after a reboot it is gone and must be made anew.
    pub boot_id: String,
    /// The reference given to `add`.
    pub reference: String,
    /// Digest of the image manifest that is served.
    pub manifest: String,
    /// How it is served; never `Auto`.
    pub transport: Transport,
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
}

impl DeviceRecord {
    /// The ublk device that it is about, if there can be one in this boot.
    #[must_use]
    pub fn claim(&self, boot_id: &str) -> Option<Claim> {
        let id = self.ublk_id.filter(|_| self.boot_id == boot_id)?;
        Some(Claim { id, creator_pid: self.creator_pid })
    }
}

/// A file that should be a record and is none of this version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// What its device should be called.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
    text: String,
}

impl Unreadable {
    /// As [`DeviceRecord::claim`], from what can be made out.
    #[must_use]
    pub fn claim(&self, boot_id: &str) -> Option<Claim> {
        let is_of_this_boot = self.value("boot_id")?.starts_with(&format!("\"{boot_id}\""));
        let id = self.number("ublk_id").filter(|_| is_of_this_boot)?;
        Some(Claim { id, creator_pid: self.number("creator_pid") })
    }

    fn number(&self, key: &str) -> Option<u32> {
        let value = self.value(key)?;
        value[..value.find(|c: char| !c.is_ascii_digit())?].parse().ok()
    }

    /// What follows a key.
    fn value(&self, key: &str) -> Option<&str> {
        Some(self.text.split_once(&format!("\"{key}\":"))?.1.trim_start())
    }
}

/// What is in the directory of records.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listed {
    /// By name.
    pub records: Vec<DeviceRecord>,
    /// What is none.
    pub unreadable: Vec<Unreadable>,
}

impl Listed {
    /// The ublk devices of this boot that the files are about, with their names.
    #[must_use]
    pub fn claims(&self, boot_id: &str) -> Vec<(String, Claim)> {
        let of_records = self.records.iter().map(|it| (&it.name, it.claim(boot_id)));
        let of_others = self.unreadable.iter().map(|it| (&it.name, it.claim(boot_id)));
        of_records.chain(of_others).filter_map(|(name, claim)| Some((name.clone(), claim?))).collect()
    }
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

    /// Takes a file away that is no record, and keeps what is in it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], naming the file.
    pub fn set_aside(&self, unreadable: &Unreadable) -> Result<PathBuf> {
        let aside = unreadable.path.with_extension("unreadable");
        fs::rename(&unreadable.path, &aside).map_err(|error| Error::path("rename", &unreadable.path, error))?;
        Ok(aside)
    }

    /// All records, by name.
    ///
    /// # Errors
    /// As [`Records::list`].
    pub fn read_all(&self) -> Result<Vec<DeviceRecord>> {
        Ok(self.list()?.records)
    }

    /// All that is there. A file that cannot be read as a record is reported in the log; an empty one is what a power cut
    /// left, and removed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the directory cannot be listed; one that does not exist has no records.
    pub fn list(&self) -> Result<Listed> {
        let mut listed = Listed::default();
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(listed),
            Err(error) => return Err(Error::io(format!("cannot list {}", self.directory.display()), error)),
        };
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
            match read(&path) {
                Ok(record) => listed.records.push(record),
                Err(unreadable) => listed.unreadable.push(unreadable),
            }
        }
        listed.records.sort_by(|a, b| a.name.cmp(&b.name));
        for unreadable in &mut listed.unreadable {
            tracing::error!(path = %unreadable.path.display(), "no device record of this version: {}", unreadable.why);
            let id = unreadable.number("ublk_id");
            if listed.records.iter().any(|record| record.ublk_id.is_some() && record.ublk_id == id) {
                // Whatever it is, that device has a record.
                unreadable.text.clear();
            }
        }
        Ok(listed)
    }
}

/// Whether a file of that name is one that [`Records::write`] did not come to rename.
pub(super) fn is_half_written(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_prefix('.')).is_some_and(|name| name.ends_with(".new"))
}

fn read(path: &Path) -> std::result::Result<DeviceRecord, Unreadable> {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let unreadable = |why: String, text: String| Unreadable { name: name.clone(), path: path.to_path_buf(), why, text };
    let file = fs::File::open(path).map_err(|error| unreadable(error.to_string(), String::new()))?;
    let mut bytes = Vec::new();
    file.take(RECORD_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(error.to_string(), String::new()))?;
    let text = || String::from_utf8_lossy(&bytes).into_owned();
    let record: DeviceRecord = serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string(), text()))?;
    if record.name != name {
        return Err(unreadable(format!("it is the record of {}", record.name), text()));
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
            creator_pid: Some(77),
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
    fn a_record_cut_short_or_of_another_version_still_says_which_device_it_is_about() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_path_buf());
        records.write(&DeviceRecord { ublk_id: Some(5), ..record("good") }).unwrap();
        let text = serde_json::to_string_pretty(&record("bad")).unwrap();
        let claim = Claim { id: 3, creator_pid: Some(77) };
        let with = |line: &str| text.replacen('{', &format!("{{ {line},"), 1);
        let fault = FaultRow::begins("a device record that was cut short, or has fields of a later version");
        for bad in [&text[..text.len() / 2], &with(r#""later": 1"#), &text.replace('\n', "").replace("}", "")] {
            fs::write(dir.path().join("bad.json"), bad).unwrap();
            let listed = records.list().unwrap();
            assert_eq!(listed.records.iter().map(|record| &record.name).collect::<Vec<_>>(), ["good"]);
            let [unreadable] = &listed.unreadable[..] else { panic!("{listed:?}") };
            assert_eq!((unreadable.name.as_str(), unreadable.claim("b")), ("bad", Some(claim)), "{bad}");
            assert_eq!(unreadable.claim("another boot"), None);
            assert_eq!(listed.claims("b").len(), 2);
            assert!(records.set_aside(unreadable).unwrap().exists());
            assert_eq!(records.list().unwrap().unreadable, []);
        }
        fault.ends("it says which device waits");
    }

    #[test]
    fn a_file_that_is_about_the_device_of_a_record_or_about_none_claims_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_path_buf());
        records.write(&record("good")).unwrap();
        let bytes = fs::read(dir.path().join("good.json")).unwrap();
        fs::write(dir.path().join("cut.json"), &bytes[..bytes.len() / 2]).unwrap();
        fs::write(dir.path().join("copy.json"), &bytes).unwrap();
        fs::write(dir.path().join("rubbish.json"), [0xff; 100]).unwrap();
        fs::write(dir.path().join(".x.new"), b"").unwrap();
        fs::write(dir.path().join("empty.json"), b"").unwrap();
        let listed = records.list().unwrap();
        assert_eq!(listed.records, [record("good")]);
        assert_eq!(listed.unreadable.len(), 3);
        assert_eq!(listed.claims("b"), [("good".to_owned(), Claim { id: 3, creator_pid: Some(77) })]);
        assert!(!dir.path().join("empty.json").exists());
    }

    #[test]
    fn records_of_version_0_1_0_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let old = r#"{
          "name": "app", "reference": "127.0.0.1:5000/app:1", "manifest": "sha256:00", "transport": "ublk", "ublk_id": 3,
          "plain_http": false, "auth_file": null, "read_timeout_ms": 300000, "mounts": ["/mnt/a"], "boot_id": "b"
        }"#;
        fs::write(dir.path().join("app.json"), old).unwrap();
        let expected = DeviceRecord { creator_pid: None, credential_files: Vec::new(), ..record("app") };
        assert_eq!(Records::new(dir.path().to_path_buf()).read_all().unwrap(), [expected]);
    }

    #[test]
    fn no_directory_means_no_records() {
        assert!(Records::new("/nonexistent/devices".into()).read_all().unwrap().is_empty());
    }
}
