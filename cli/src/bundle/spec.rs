//! The `config.json` of a bundle (OCI runtime specification 1.0): what container tools give a container by default, with the
//! command, environment, directory and user of the image's config, and what the user wants otherwise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::accounts::{self, User};
use super::image_config::ImageConfig;
use crate::cdi;

/// What docker lets a container do by default: enough for services that change their user.
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

/// A directory or file of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BindMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: String,
    pub(crate) read_only: bool,
}

/// What the user wants otherwise than the image has it.
#[derive(Debug, Default)]
pub(crate) struct Overrides {
    pub(crate) command: Vec<String>,
    /// `NAME=VALUE`; replaces one of the same name.
    pub(crate) env: Vec<String>,
    pub(crate) user: Option<String>,
    pub(crate) working_dir: Option<String>,
    pub(crate) hostname: Option<String>,
    pub(crate) mounts: Vec<BindMount>,
    /// Instead of a network of its own that has nothing but loopback.
    pub(crate) host_network: bool,
    pub(crate) terminal: bool,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) hooks: Option<Hooks>,
    /// What the devices of the host that are wanted in it change.
    pub(crate) edits: Vec<cdi::Edits>,
}

/// Our own hooks: they lease what the container uses, and mount the images that annotations name.
#[derive(Debug, Clone)]
pub(crate) struct Hooks {
    /// This program.
    pub(crate) program: PathBuf,
    /// Its arguments before `hook`.
    pub(crate) arguments: Vec<String>,
    /// What follows the phase: how long it may take, and how images are attached.
    pub(crate) options: Vec<String>,
}

impl Hooks {
    /// Without `timeout`: our hooks end by themselves.
    pub(crate) fn to_json(&self) -> Value {
        let phase = |name: &str| {
            let before = ["ublkimg"].into_iter().chain(self.arguments.iter().map(String::as_str));
            let arguments = before.chain(["hook", name]).chain(self.options.iter().map(String::as_str));
            json!([{ "path": self.program, "args": arguments.collect::<Vec<_>>() }])
        };
        json!({
            "createRuntime": phase("createRuntime"),
            "poststart": phase("poststart"),
            "poststop": phase("poststop"),
        })
    }
}

/// The configuration for the image at `rootfs`. Reads its accounts if its user has a name.
///
/// # Errors
/// When there is no command, or no such user.
pub(crate) fn spec(image: &ImageConfig, rootfs: &Path, overrides: &Overrides) -> anyhow::Result<Value> {
    let user = accounts::user(overrides.user.as_deref().unwrap_or(image.user()), rootfs)?;
    let mut namespaces = vec!["pid", "ipc", "uts", "mount", "cgroup"];
    if !overrides.host_network {
        namespaces.push("network");
    }
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs", "readonly": false },
        "hostname": overrides.hostname.as_deref().unwrap_or("ublkimg"),
        "process": process(image, overrides, &user)?,
        "mounts": mounts(overrides),
        "linux": {
            "namespaces": namespaces.iter().map(|kind| json!({ "type": kind })).collect::<Vec<_>>(),
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
                "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    if overrides.host_network {
        // Who shares the network shares its name.
        spec["linux"]["namespaces"].as_array_mut().into_iter().for_each(|all| all.retain(|one| one["type"] != "uts"));
        spec.as_object_mut().into_iter().for_each(|spec| drop(spec.remove("hostname")));
    }
    if !overrides.annotations.is_empty() {
        spec["annotations"] = json!(overrides.annotations);
    }
    if let Some(hooks) = &overrides.hooks {
        spec["hooks"] = hooks.to_json();
    }
    for edits in &overrides.edits {
        cdi::apply(&mut spec, edits)?;
    }
    Ok(spec)
}

fn process(image: &ImageConfig, overrides: &Overrides, user: &User) -> anyhow::Result<Value> {
    let mut env = image.env().to_vec();
    for variable in &overrides.env {
        let name = variable.split_inclusive('=').next().unwrap_or(variable);
        env.retain(|other| !other.starts_with(name));
        env.push(variable.clone());
    }
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push(PATH.to_owned());
    }
    // Those of a user that is not root would be lost at exec anyway.
    let capabilities = json!(CAPABILITIES);
    Ok(json!({
        "terminal": overrides.terminal,
        "args": image.command(&overrides.command)?,
        "env": env,
        "cwd": overrides.working_dir.as_deref().unwrap_or(image.working_dir()),
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.more_gids },
        "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        "noNewPrivileges": false,
    }))
}

fn mounts(overrides: &Overrides) -> Vec<Value> {
    let special = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let sys = match overrides.host_network {
        // Without a network namespace of its own a sysfs cannot be mounted.
        true => {
            json!({ "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] })
        }
        false => special("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    };
    let mut mounts = vec![
        special("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        special("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        special("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        special("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
        special("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        sys,
        special("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    mounts.extend(overrides.mounts.iter().map(|mount| {
        let access = if mount.read_only { "ro" } else { "rw" };
        json!({ "destination": mount.destination, "type": "bind", "source": mount.source, "options": ["rbind", "rprivate", access] })
    }));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_s_wishes_come_before_the_image_s() {
        let image =
            r#"{"config": {"User": "7:8", "Env": ["A=1", "AB=2", "PATH=/bin"], "Cmd": ["run"], "WorkingDir": "/w"}}"#;
        let image: ImageConfig = serde_json::from_str(image).unwrap();
        let plain = spec(&image, Path::new("/nonexistent"), &Overrides::default()).unwrap();
        assert_eq!(plain["process"]["args"], json!(["run"]));
        assert_eq!(plain["process"]["env"], json!(["A=1", "AB=2", "PATH=/bin"]));
        assert_eq!(plain["process"]["cwd"], "/w");
        assert_eq!(plain["process"]["user"], json!({ "uid": 7, "gid": 8, "additionalGids": [] }));
        let overrides = Overrides {
            command: vec!["sh".to_owned()],
            env: vec!["A=3".to_owned()],
            user: Some("9".to_owned()),
            working_dir: Some("/".to_owned()),
            mounts: vec![BindMount { source: "/models".into(), destination: "/m".to_owned(), read_only: true }],
            host_network: true,
            ..Overrides::default()
        };
        let other = spec(&image, Path::new("/nonexistent"), &overrides).unwrap();
        assert_eq!(other["process"]["args"], json!(["sh"]));
        assert_eq!(other["process"]["env"], json!(["AB=2", "PATH=/bin", "A=3"]));
        assert_eq!(other["process"]["user"]["uid"], 9);
        assert!(other["mounts"].as_array().unwrap().iter().any(|mount| mount["destination"] == "/m"));
        assert!(!other["linux"]["namespaces"].to_string().contains("network"));
    }
}
