//! `ublkimg bundle`: a complete bundle for runc or crun, of an image that need not be here yet.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use ublkimg_driver::daemon::device_name;
use ublkimg_driver::daemon::protocol::{AddRequest, DeviceStatus, StartOptions};

use super::root::Root;
use super::{add, hook, image_config, rm};
use crate::args::bundle::Bundle;
use crate::args::{AttachArguments, Global};
use crate::bundle::{Hooks, Overrides};
use crate::cdi;
use crate::output;

/// What `bundle --json` prints.
#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    device: &'a Path,
    bundle: &'a Path,
    manifest: &'a str,
}

pub(super) fn run(global: &Global, command: &Bundle) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let start = StartOptions {
        profile: add::profile(&command.profile)?,
        command: command.command.clone(),
        record: !command.attach.no_record,
        read_ahead_kb: None,
        fill: add::fill_mode(command.attach.fill),
        warm: command.attach.warm.is_on(),
    };
    let request = add::request(&command.reference, command.name.as_deref(), &command.attach, start)?;
    // Before anything is attached: a wrong name should cost nothing.
    let edits = cdi::find(&command.cdi_dirs, &command.device)?;
    let directory = super::absolute(&command.directory)?;
    let wanted = Root {
        directory: &directory.join("rootfs"),
        config: Some(directory.join("config.json")),
        upper: command.upper.as_deref().map(super::absolute).transpose()?,
    };
    if command.dry_run {
        return tell(&request, &wanted, command);
    }
    let was_there = directory.join("config.json").exists();
    let target = add::Target::Root(wanted);
    let (device, _) = add::attach(global, &directories, request, &target, command.attach.timeout)?;
    if let Err(error) = configure(global, command, &device, &directory, edits) {
        // A root without a configuration is no bundle; one that was there before may be in use.
        if !was_there {
            let _ = rm::remove(&directories, &device, true);
        }
        return Err(error);
    }
    if command.json {
        let report =
            Report { name: &device.name, device: &device.device, bundle: &directory, manifest: &device.manifest };
        return output::json(&report);
    }
    output::line(&format!("{} {}", device.name, directory.display()))
}

/// What would be done, one step a line.
fn tell(request: &AddRequest, wanted: &Root<'_>, command: &Bundle) -> anyhow::Result<()> {
    let name = request.name.clone().unwrap_or_else(|| device_name(&request.reference));
    let changes = wanted.upper.as_ref().map_or_else(|| "in memory".to_owned(), |upper| upper.display().to_string());
    output::line(&format!("attach {} as {name}", request.reference))?;
    output::line(&format!("mount a writable root at {}, its changes {changes}", wanted.directory.display()))?;
    if let Some(config) = &wanted.config {
        output::line(&format!("write {}", config.display()))?;
    }
    for (path, reference) in &command.mount_image {
        output::line(&format!("when the container starts: mount {} at {path}", super::location(reference)?))?;
    }
    Ok(())
}

fn configure(
    global: &Global,
    command: &Bundle,
    device: &DeviceStatus,
    directory: &Path,
    edits: Vec<cdi::Edits>,
) -> anyhow::Result<()> {
    let image = image_config::fetch(&command.attach.registry, &command.reference, &device.manifest)?;
    let overrides = Overrides {
        command: command.command.clone(),
        env: command.env.iter().filter_map(|variable| environment(variable)).collect(),
        user: command.user.clone(),
        working_dir: command.workdir.clone(),
        hostname: command.hostname.clone(),
        mounts: command.volume.clone(),
        host_network: command.host_network,
        terminal: command.tty,
        annotations: if command.no_hooks { BTreeMap::new() } else { annotations(command, device)? },
        hooks: if command.no_hooks { None } else { Some(hooks(global, &command.attach)?) },
        edits,
    };
    crate::bundle::write(directory, &image, &overrides)
}

/// What our hooks read.
fn annotations(command: &Bundle, device: &DeviceStatus) -> anyhow::Result<BTreeMap<String, String>> {
    let mut annotations = BTreeMap::from([(hook::ROOT.to_owned(), device.name.clone())]);
    for (path, reference) in &command.mount_image {
        // Here, not when the container starts: a typing error should be found by who makes it.
        let location = super::location(reference)?;
        annotations.insert(format!("{}{path}", hook::MOUNT_PREFIX), location.to_string());
    }
    Ok(annotations)
}

/// With the directories and the registry options of this command.
pub(super) fn hooks(global: &Global, attach: &AttachArguments) -> anyhow::Result<Hooks> {
    let directories = super::directories(global)?;
    let mut arguments = Vec::new();
    let directories = [("--root", &directories.root), ("--run-dir", &directories.run)];
    for (option, path) in global.config.iter().map(|file| ("--config", file)).chain(directories) {
        arguments.extend([option.to_owned(), path.display().to_string()]);
    }
    Ok(Hooks { program: std::env::current_exe()?, arguments, options: hook_options(attach)? })
}

fn hook_options(attach: &AttachArguments) -> anyhow::Result<Vec<String>> {
    let mut options = vec![format!("--timeout={}ms", add::milliseconds(attach.timeout))];
    if attach.registry.plain_http {
        options.push("--plain-http".to_owned());
    }
    if let Some(file) = &attach.registry.auth_file {
        options.push(format!("--auth-file={}", super::absolute(file)?.display()));
    }
    options.extend(attach.registry.hosts_dirs.iter().map(|dir| format!("--hosts-dir={}", dir.display())));
    Ok(options)
}

/// `NAME=VALUE`; the value of this process if only a name is given, nothing if it has none.
fn environment(variable: &str) -> Option<String> {
    if variable.contains('=') {
        return Some(variable.to_owned());
    }
    Some(format!("{variable}={}", std::env::var(variable).ok()?))
}
