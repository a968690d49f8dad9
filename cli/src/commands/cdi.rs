//! `ublkimg cdi generate`: an attached image as a device that container tools know how to mount.

use std::path::Path;

use ublkimg_driver::error::{Error, ErrorKind};

use super::status;
use crate::args::Global;
use crate::args::cdi::{Cdi, CdiAction, CdiGenerate};
use crate::cdi::{Device, DeviceName, Edits, Mount, Specification, VERSION};
use crate::output;

pub(super) fn run(global: &Global, command: &Cdi) -> anyhow::Result<()> {
    match &command.action {
        CdiAction::Generate(command) => generate(global, command),
    }
}

fn generate(global: &Global, command: &CdiGenerate) -> anyhow::Result<()> {
    let device = status::find(&super::directories(global)?, &command.target)?;
    let refuse = |text: String| Error::new(ErrorKind::Invalid, text);
    let Some(mount) = device.mounts.first() else {
        let remedy = format!("`ublkimg add {} --mount DIR` mounts it", device.reference);
        return Err(refuse(format!("{} is not mounted: {remedy}", device.name)).into());
    };
    let name: DeviceName = format!("{}={}", command.kind, device.name).parse().map_err(refuse)?;
    let path = command.path.clone().unwrap_or_else(|| mount.display().to_string());
    if !path.starts_with('/') {
        return Err(refuse(format!("{path:?} is not an absolute path")).into());
    }
    let options = ["rbind", "ro", "rprivate"].map(str::to_owned).to_vec();
    let mount = Mount { host_path: mount.clone(), container_path: path, options, kind: None };
    let specification = Specification {
        cdi_version: VERSION.to_owned(),
        kind: name.kind,
        annotations: [].into(),
        devices: vec![Device {
            name: name.name,
            annotations: [].into(),
            container_edits: Edits { mounts: vec![mount], ..Edits::default() },
        }],
        container_edits: Edits::default(),
    };
    match &command.output {
        Some(file) => write(file, &specification),
        None => output::json(&specification),
    }
}

/// Whole at once: container tools read these directories at any time.
fn write(file: &Path, specification: &Specification) -> anyhow::Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    // Not a name that they look for.
    temporary.push(".new");
    let written = std::fs::write(&temporary, serde_json::to_vec_pretty(specification)?)
        .and_then(|()| std::fs::rename(&temporary, file));
    Ok(written.map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        Error::io(format!("cannot write {}", file.display()), error)
    })?)
}
