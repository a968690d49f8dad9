//! Edits, made in the `config.json` of a bundle (OCI runtime specification 1.0).

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Value, json};
use ublkimg_driver::error::{Error, ErrorKind, Result};

use super::{DeviceNode, Edits, Hook, Mount};

/// What the runtime specification has.
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
/// Read, write, and make the node.
const ALL: &str = "rwm";

/// # Errors
/// A device node that the host does not have, or a hook that runtimes do not know.
pub(crate) fn apply(spec: &mut Value, edits: &Edits) -> Result<()> {
    for variable in &edits.env {
        let name = variable.split_inclusive('=').next().unwrap_or(variable);
        edit(&mut spec["process"]["env"], |env| {
            env.retain(|other| !other.as_str().is_some_and(|other| other.starts_with(name)));
            env.push(json!(variable));
        });
    }
    for node in &edits.device_nodes {
        add_node(spec, node)?;
    }
    for mount in &edits.mounts {
        edit(&mut spec["mounts"], |mounts| add_mount(mounts, mount));
    }
    for hook in &edits.hooks {
        add_hook(spec, hook)?;
    }
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        edit(&mut spec["process"]["user"]["additionalGids"], |gids| {
            gids.retain(|other| *other != *gid);
            gids.push(json!(gid));
        });
    }
    Ok(())
}

fn add_node(spec: &mut Value, node: &DeviceNode) -> Result<()> {
    let host = node.host_path.as_deref().unwrap_or(node.path.as_ref());
    let found = std::fs::metadata(host).ok();
    let kind = node.kind.as_deref().or_else(|| {
        let kind = found.as_ref()?.file_type();
        if kind.is_char_device() { Some("c") } else { kind.is_block_device().then_some("b") }
    });
    let number = found.as_ref().map(MetadataExt::rdev);
    let major = node.major.or_else(|| number.map(rustix::fs::major));
    let minor = node.minor.or_else(|| number.map(rustix::fs::minor));
    let (Some(kind), Some(major), Some(minor)) = (kind, major, minor) else {
        return Err(Error::new(ErrorKind::NotFound, format!("{} is no device of this host", host.display())));
    };
    let mut device = json!({ "path": node.path, "type": kind, "major": major, "minor": minor });
    let mode = node.file_mode.or_else(|| found.as_ref().map(|metadata| metadata.mode() & 0o777));
    let owner = node.uid.or_else(|| found.as_ref().map(MetadataExt::uid));
    let group = node.gid.or_else(|| found.as_ref().map(MetadataExt::gid));
    for (key, value) in [("fileMode", mode), ("uid", owner), ("gid", group)] {
        if let Some(value) = value {
            device[key] = json!(value);
        }
    }
    edit(&mut spec["linux"]["devices"], |devices| {
        devices.retain(|other| other["path"] != device["path"]);
        devices.push(device);
    });
    let access = node.permissions.as_deref().unwrap_or(ALL);
    let allowed = json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access });
    edit(&mut spec["linux"]["resources"]["devices"], |devices| devices.push(allowed));
    Ok(())
}

fn add_mount(mounts: &mut Vec<Value>, mount: &Mount) {
    let mut options = mount.options.clone();
    if mount.kind.is_none() && !options.iter().any(|option| option == "bind" || option == "rbind") {
        options.push("rbind".to_owned());
    }
    mounts.retain(|other| other["destination"] != mount.container_path.as_str());
    let kind = mount.kind.as_deref().unwrap_or("bind");
    let made =
        json!({ "destination": mount.container_path, "type": kind, "source": mount.host_path, "options": options });
    mounts.push(made);
}

fn add_hook(spec: &mut Value, hook: &Hook) -> Result<()> {
    if !HOOKS.contains(&&*hook.hook_name) {
        return Err(Error::new(ErrorKind::Invalid, format!("runtimes call no hook {}", hook.hook_name)));
    }
    let mut made = json!({ "path": hook.path, "args": hook.args, "env": hook.env });
    if let Some(seconds) = hook.timeout {
        made["timeout"] = json!(seconds);
    }
    edit(&mut spec["hooks"][&hook.hook_name], |hooks| hooks.push(made));
    Ok(())
}

/// Changes the list at a place, an empty one if there is none.
fn edit(place: &mut Value, change: impl FnOnce(&mut Vec<Value>)) {
    let mut list = match place.take() {
        Value::Array(list) => list,
        _ => Vec::new(),
    };
    change(&mut list);
    *place = Value::Array(list);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(edits: Value) -> Result<Value> {
        let mut spec = json!({
            "process": { "env": ["A=1", "B=2"], "user": { "additionalGids": [5] } },
            "mounts": [{ "destination": "/m", "source": "old" }],
            "linux": { "resources": { "devices": [{ "allow": false, "access": "rwm" }] } },
        });
        apply(&mut spec, &serde_json::from_value(edits).unwrap()).map(|()| spec)
    }

    #[test]
    fn everything_lands_where_runtimes_look() {
        let spec = edited(json!({
            "env": ["B=3"],
            "deviceNodes": [{ "path": "/dev/gift", "hostPath": "/dev/zero", "permissions": "r", "fileMode": 0o644 }],
            "mounts": [{ "hostPath": "/new", "containerPath": "/m", "options": ["ro"] }],
            "hooks": [{ "hookName": "createRuntime", "path": "/h", "args": ["h", "x"], "timeout": 3 }],
            "additionalGids": [0, 5, 7],
        }))
        .unwrap();
        assert_eq!(spec["process"]["env"], json!(["A=1", "B=3"]));
        let device = &spec["linux"]["devices"][0];
        assert_eq!((&device["path"], &device["type"], &device["major"]), (&json!("/dev/gift"), &json!("c"), &json!(1)));
        assert_eq!((&device["minor"], &device["fileMode"], &device["uid"]), (&json!(5), &json!(0o644), &json!(0)));
        let allowed = json!({ "allow": true, "type": "c", "major": 1, "minor": 5, "access": "r" });
        assert_eq!(spec["linux"]["resources"]["devices"][1], allowed);
        let mount = json!({ "destination": "/m", "type": "bind", "source": "/new", "options": ["ro", "rbind"] });
        assert_eq!(spec["mounts"], json!([mount]));
        let hook = json!({ "path": "/h", "args": ["h", "x"], "env": [], "timeout": 3 });
        assert_eq!(spec["hooks"], json!({ "createRuntime": [hook] }));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([5, 7]));
    }

    #[test]
    fn what_the_host_lacks_is_named() {
        let missing = edited(json!({ "deviceNodes": [{ "path": "/dev/nowhere" }] })).unwrap_err();
        assert_eq!((missing.kind(), missing.to_string().contains("/dev/nowhere")), (ErrorKind::NotFound, true));
        let file = edited(json!({ "deviceNodes": [{ "path": "/proc/version" }] })).unwrap_err();
        assert_eq!(file.kind(), ErrorKind::NotFound);
        assert!(edited(json!({ "hooks": [{ "hookName": "later", "path": "/h" }] })).is_err());
        // All of it is said: the host is not asked.
        let told = json!({ "deviceNodes": [{ "path": "/dev/nowhere", "type": "c", "major": 9, "minor": 1 }] });
        assert_eq!(edited(told).unwrap()["linux"]["devices"][0]["major"], 9);
    }
}
