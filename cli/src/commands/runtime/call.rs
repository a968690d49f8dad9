//! The command line of runc, as far as it concerns us: `[OPTIONS] create|run|delete [OPTIONS] ID`. crun's is the same.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ublkimg_image::Sha256;

/// Options of runc and crun whose value may be a word of its own.
const WITH_VALUE: [&str; 11] = [
    "b",
    "bundle",
    "cgroup-manager",
    "console-socket",
    "criu",
    "log",
    "log-format",
    "pid-file",
    "preserve-fds",
    "root",
    "rootless",
];

/// What is wanted of a runtime.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Call {
    /// `create`, say; none for `--version`.
    pub(super) command: Option<OsString>,
    /// The last word that is no option.
    pub(super) id: Option<OsString>,
    bundle: Option<PathBuf>,
    /// Where the runtime keeps its containers: an id is good within it.
    root: Option<OsString>,
    /// Where callers look for errors.
    pub(super) log: Option<PathBuf>,
    pub(super) logs_json: bool,
}

impl Call {
    pub(super) fn of(words: &[OsString]) -> Self {
        let mut call = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(option) = word.as_bytes().strip_prefix(b"-") else {
                let place = if call.command.is_none() { &mut call.command } else { &mut call.id };
                *place = Some(word.clone());
                continue;
            };
            let option = option.strip_prefix(b"-").unwrap_or(option);
            let (name, value) = match option.iter().position(|byte| *byte == b'=') {
                Some(at) => (&option[..at], Some(OsStr::from_bytes(&option[at + 1..]).to_owned())),
                None => (option, None),
            };
            let name = String::from_utf8_lossy(name).into_owned();
            if !WITH_VALUE.contains(&&*name) {
                continue;
            }
            if let Some(value) = value.or_else(|| words.next().cloned()) {
                call.take(&name, value);
            }
        }
        call
    }

    fn take(&mut self, name: &str, value: OsString) {
        match name {
            "b" | "bundle" => self.bundle = Some(value.into()),
            "root" => self.root = Some(value),
            "log" => self.log = Some(value.into()),
            "log-format" => self.logs_json = value == "json",
            _ => {}
        }
    }

    /// The bundle's directory.
    pub(super) fn bundle(&self) -> &Path {
        self.bundle.as_deref().unwrap_or(Path::new("."))
    }

    /// The name of the device for this container's root: no two containers have the same.
    pub(super) fn device_name(&self) -> String {
        let [root, id] = [&self.root, &self.id].map(|word| word.as_deref().unwrap_or_default().as_bytes());
        let hash = Sha256::of(&[root, b"\0", id].concat()).to_string();
        let digits: String = hash.trim_start_matches("sha256:").chars().take(16).collect();
        format!("root-{digits}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Call {
        Call::of(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_ways_in_which_runtimes_are_called() {
        let shim = of("--root /run/r --log /b/log.json --log-format json create --bundle /b --pid-file /b/pid c1");
        assert_eq!((shim.command.as_deref(), shim.id.as_deref()), (Some("create".as_ref()), Some("c1".as_ref())));
        assert_eq!(
            (shim.bundle(), shim.log.as_deref(), shim.logs_json),
            (Path::new("/b"), Some(Path::new("/b/log.json")), true)
        );
        let by_hand = of("--debug run -d -b=/b c1");
        assert_eq!((by_hand.command.as_deref(), by_hand.bundle()), (Some("run".as_ref()), Path::new("/b")));
        assert_ne!(by_hand.device_name(), shim.device_name(), "another state directory");
        assert_eq!(of("--root /run/r delete --force c1").device_name(), shim.device_name());
        assert_eq!(of("run c1").bundle(), Path::new("."));
        assert_eq!(of("--version"), Call::default());
    }
}
