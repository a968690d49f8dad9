//! `ublkimg-runc`: what podman, docker and containerd can be given as their runtime.
//!
//! It takes runc's command line. Before `create` and `run` it looks at the annotations in the bundle's `config.json`: an image
//! is attached and becomes the container's root, and our hooks are added, which lease it and take it away when the container
//! has ended. Then another runtime is executed in this process's place, so nobody sees a difference. Everything else goes to
//! that runtime at once.

mod call;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::protocol::{ProfileRequest, StartOptions};
use ublkimg_driver::error::{Error, ErrorKind};

use self::call::Call;
use super::root::Root;
use super::{add, bundle, hook, rm, status};
use crate::args::Global;
use crate::args::runtime::Runtime;
use crate::exit;
use crate::lease::Leases;

/// `dev.ublkimg.image` = a reference: that image is the container's root.
const IMAGE: &str = "dev.ublkimg.image";
/// Every annotation that asks something of us begins like this.
const OURS: &str = "dev.ublkimg.";
/// Beside the bundle's configuration.
const ROOTFS: &str = "ublkimg-rootfs";

pub(super) fn run(global: &Global, command: &Runtime) -> anyhow::Result<()> {
    let call = Call::of(&command.arguments);
    let mut chained = Command::new(&command.program);
    chained.args(&command.arguments);
    match call.command.as_deref().and_then(|command| command.to_str()) {
        Some("create" | "run") => prepare(global, command, &call).inspect_err(|error| log(&call, error))?,
        Some("delete") => return delete(global, &call, chained, &command.program),
        _ => {}
    }
    Err(cannot_run(&command.program, chained.exec()).into())
}

fn cannot_run(program: &Path, error: std::io::Error) -> Error {
    let kind = if error.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
    Error::caused(kind, format!("cannot run {} (--runtime, UBLKIMG_RUNTIME)", program.display()), error)
}

fn prepare(global: &Global, command: &Runtime, call: &Call) -> anyhow::Result<()> {
    let bundle = super::resolved(call.bundle())?;
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|error| Error::path("read", &path, error))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::caused(ErrorKind::Invalid, format!("{} is no configuration", path.display()), error))?;
    let annotations = config["annotations"].as_object();
    if !annotations.is_some_and(|all| all.keys().any(|key| key.starts_with(OURS))) {
        return Ok(());
    }
    let directories = super::directories(global)?;
    let attached = supply_root(global, command, call, &directories, &bundle, &mut config)?;
    let done = add_hooks(&mut config, &bundle::hooks(global, &command.attach)?.to_json())
        .and_then(|()| replace(&path, &config));
    if done.is_err() && attached {
        let _ = remove(&directories, &call.device_name());
    }
    done
}

/// Attaches the image of the annotation and names it as the root; tells whether there is one.
fn supply_root(
    global: &Global,
    command: &Runtime,
    call: &Call,
    directories: &Directories,
    bundle: &Path,
    config: &mut Value,
) -> anyhow::Result<bool> {
    let Some(reference) = config["annotations"][IMAGE].as_str().map(str::to_owned) else { return Ok(false) };
    let arguments = config["process"]["args"].as_array().into_iter().flatten();
    let start = StartOptions {
        profile: ProfileRequest::Auto,
        command: arguments.filter_map(|word| word.as_str().map(str::to_owned)).collect(),
        record: !command.attach.no_record,
        read_ahead_kb: None,
        fill: add::fill_mode(command.attach.fill),
        warm: command.attach.warm.is_on(),
    };
    let name = call.device_name();
    let request = add::request(&reference, Some(&name), &command.attach, start)?;
    let rootfs = bundle.join(ROOTFS);
    let target = add::Target::Root(Root { directory: &rootfs, config: None, upper: None });
    add::attach(global, directories, request, &target, command.attach.timeout)?;
    config["root"]["path"] = json!(rootfs);
    config["annotations"][hook::ROOT] = json!(name);
    config["annotations"][hook::REMOVE] = json!(hook::POSTSTOP);
    Ok(true)
}

/// Adds ours to the hooks of the configuration, each once: a bundle can be run again.
fn add_hooks(config: &mut Value, ours: &Value) -> anyhow::Result<()> {
    for (phase, hooks) in ours.as_object().into_iter().flatten() {
        let present = &mut config["hooks"][phase];
        let mut all = present.as_array().cloned().unwrap_or_default();
        let missing: Vec<_> =
            hooks.as_array().into_iter().flatten().filter(|hook| !all.contains(hook)).cloned().collect();
        all.extend(missing);
        *present = Value::Array(all);
    }
    Ok(())
}

/// Whole at once.
fn replace(path: &Path, config: &Value) -> anyhow::Result<()> {
    let temporary = path.with_extension("json.new");
    let written =
        std::fs::write(&temporary, serde_json::to_vec_pretty(config)?).and_then(|()| std::fs::rename(&temporary, path));
    Ok(written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?)
}

/// The runtime's own `delete`, and then what a container left that failed before its runtime called a hook.
fn delete(global: &Global, call: &Call, mut chained: Command, program: &Path) -> anyhow::Result<()> {
    let status = chained.status().map_err(|error| cannot_run(program, error))?;
    if let Err(error) = remove(&super::directories(global)?, &call.device_name()) {
        tracing::warn!("{error:#}");
    }
    match status.code() {
        Some(0) => Ok(()),
        code => std::process::exit(code.unwrap_or_else(|| 128 + status.signal().unwrap_or_default())),
    }
}

/// Removes a container's root, unless the container lives.
fn remove(directories: &Directories, name: &str) -> anyhow::Result<()> {
    let leases = Leases::of(directories, name);
    let _lock = leases.lock()?;
    let device = match status::find(directories, name) {
        Ok(device) if leases.holder().is_none() => device,
        Ok(_) => return Ok(()),
        Err(error) if hook::is_not_found(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    rm::remove_patiently(directories, &device, false)?;
    leases.forget();
    Ok(())
}

/// Where the caller of a runtime looks for what went wrong.
fn log(call: &Call, error: &anyhow::Error) {
    use std::io::Write;
    let Some(path) = &call.log else { return };
    let message = format!("ublkimg: {}", exit::one_line(error));
    let line = if call.logs_json { json!({ "level": "error", "msg": message }).to_string() } else { message };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // It is on stderr too.
    let _ = file.and_then(|mut file| writeln!(file, "{line}"));
}
