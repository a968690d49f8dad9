//! A bundle for runc: its own default configuration, with the command, the environment, the directory and the user of the
//! image's config.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Value, json};
use ublkimg_driver::error::{Error, ErrorKind};

/// What docker lets a container do by default; runc's own default is too little for services that change their user.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A container's usual one, where the image has none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An account file of an image is not longer; a longer one is not read.
const ACCOUNTS_BYTES_MAX: u64 = 1 << 20;

/// The image config, as far as it says how to run the image.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ImageConfig {
    #[serde(default)]
    config: Option<Process>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
}

impl ImageConfig {
    /// The command to run: what the user gave, else the image's own.
    pub(super) fn command(&self, given: &[String]) -> anyhow::Result<Vec<String>> {
        if !given.is_empty() {
            return Ok(given.to_vec());
        }
        let process = self.config.as_ref();
        let parts = process.map(|process| [process.entrypoint.clone(), process.cmd.clone()]);
        let own: Vec<String> = parts.into_iter().flatten().flatten().flatten().collect();
        if own.is_empty() {
            let text = "the image has no command of its own: give one after `--`";
            return Err(Error::new(ErrorKind::Invalid, text).into());
        }
        Ok(own)
    }
}

/// A bundle directory whose `rootfs` holds the image.
pub(super) struct Bundle {
    directory: PathBuf,
    state: PathBuf,
}

impl Bundle {
    /// `directory/rootfs` is to be the tree; `state` is where runc keeps its own.
    pub(super) fn new(directory: &Path, state: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory.join("rootfs"))?;
        Ok(Self { directory: directory.to_owned(), state: state.to_owned() })
    }

    pub(super) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Writes `config.json`. Reads the accounts of the image if its user has a name.
    pub(super) fn configure(&self, image: &ImageConfig, command: &[String], own_network: bool) -> anyhow::Result<()> {
        let made = Command::new("runc").arg("spec").current_dir(&self.directory).stdin(Stdio::null()).output();
        let made = made.map_err(|error| Error::caused(ErrorKind::Unsupported, "cannot run runc: install it", error))?;
        if !made.status.success() {
            let said = String::from_utf8_lossy(&made.stderr).trim().to_owned();
            return Err(Error::new(ErrorKind::Io, format!("runc spec failed: {said}")).into());
        }
        let path = self.directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?).context("runc spec wrote no JSON")?;
        let default = Process::default();
        let process = image.config.as_ref().unwrap_or(&default);
        let (uid, gid) = user(process.user.as_deref().unwrap_or_default(), &self.rootfs())?;
        let mut env = process.env.clone().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("PATH=")) {
            env.push(PATH.to_owned());
        }
        let directory = process.working_dir.as_deref().filter(|directory| !directory.is_empty()).unwrap_or("/");
        let to = &mut config["process"];
        to["args"] = json!(command);
        to["env"] = json!(env);
        to["cwd"] = json!(directory);
        to["user"] = json!({ "uid": uid, "gid": gid });
        to["terminal"] = json!(false);
        to["noNewPrivileges"] = json!(false);
        for set in ["bounding", "effective", "permitted"] {
            to["capabilities"][set] = json!(CAPABILITIES);
        }
        config["root"] = json!({ "path": "rootfs", "readonly": false });
        if !own_network && let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(())
    }

    /// Runs it. What it prints goes to our stderr: stdout is for results.
    pub(super) fn run(&self, id: &str) -> anyhow::Result<Child> {
        use std::os::fd::AsFd;
        use std::os::unix::process::CommandExt;
        let stderr = std::io::stderr();
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(&self.state).arg("run").arg("--bundle").arg(&self.directory).arg(id);
        // In a process group of its own: an interrupt is ours to handle.
        runc.stdin(Stdio::null()).stdout(stderr.as_fd().try_clone_to_owned()?).process_group(0);
        Ok(runc.spawn().map_err(|error| Error::io("cannot run runc", error))?)
    }

    pub(super) fn state(&self) -> &Path {
        &self.state
    }
}

/// The numbers of `USER[:GROUP]`, each a number or a name of the image.
fn user(text: &str, rootfs: &Path) -> anyhow::Result<(u32, u32)> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let unknown =
        |what: &str| Error::new(ErrorKind::Invalid, format!("the image's user {text:?}: no such {what} in it"));
    let account = || account(&rootfs.join("etc/passwd"), user);
    let (uid, own_gid) = match user.parse::<u32>() {
        _ if user.is_empty() => (0, 0),
        Ok(uid) => (uid, 0),
        Err(_) => account().ok_or_else(|| unknown("user"))?,
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => account_number(&rootfs.join("etc/group"), group).ok_or_else(|| unknown("group"))?,
        },
    };
    Ok((uid, gid))
}

/// The fields of the line of `name` in an account file.
fn fields(file: &Path, name: &str) -> Option<Vec<String>> {
    // Not through a link: it is the image's, and may lead out of it.
    let metadata = std::fs::symlink_metadata(file).ok()?;
    if !metadata.is_file() || metadata.len() > ACCOUNTS_BYTES_MAX {
        return None;
    }
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    Some(line.split(':').map(str::to_owned).collect())
}

fn account(file: &Path, name: &str) -> Option<(u32, u32)> {
    let fields = fields(file, name)?;
    Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
}

fn account_number(file: &Path, name: &str) -> Option<u32> {
    fields(file, name)?.get(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_the_given_one_or_the_image_s() {
        let parse = |text: &str| serde_json::from_str::<ImageConfig>(text).unwrap();
        let image = parse(r#"{"config": {"Entrypoint": ["run"], "Cmd": ["a", "b"], "Env": null}}"#);
        assert_eq!(image.command(&[]).unwrap(), ["run", "a", "b"]);
        assert_eq!(image.command(&["sh".to_owned()]).unwrap(), ["sh"]);
        for none in ["{}", r#"{"config": null}"#, r#"{"config": {"Cmd": []}}"#] {
            assert!(parse(none).command(&[]).is_err(), "{none}");
        }
    }

    #[test]
    fn users_by_number_and_name() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:\nweb:x:33:34::/:\nbad:x\n").unwrap();
        std::fs::write(root.path().join("etc/group"), "root:x:0:\nstaff:x:50:\n").unwrap();
        let user = |text| user(text, root.path());
        for (text, numbers) in [
            ("", (0, 0)),
            ("1000", (1000, 0)),
            ("1000:7", (1000, 7)),
            ("web", (33, 34)),
            ("web:staff", (33, 50)),
            ("web:9", (33, 9)),
        ] {
            assert_eq!(user(text).unwrap(), numbers, "{text}");
        }
        for text in ["nobody", "bad", "web:none"] {
            assert!(user(text).is_err(), "{text}");
        }
    }
}
