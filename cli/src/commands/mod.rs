//! One module a command.

mod add;
mod bundle;
mod cache;
mod cdi;
mod check;
mod compare;
mod convert;
mod daemon;
mod docs;
mod doctor;
mod events;
mod export;
mod fill;
pub(crate) mod hook;
mod image_config;
mod inspect;
mod local;
mod ls;
mod metrics;
mod mount_helper;
mod mount_into;
mod optimize;
mod pull;
mod ready;
mod record;
mod report;
mod rm;
mod root;
mod runtime;
mod status;
mod top;
mod trace;
mod trial;
mod up;

use std::path::Path;

use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::protocol::Answer;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::mounts;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Location};

use crate::args::{Arguments, Command, Global, RegistryOptions};

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let global = &arguments.global;
    match arguments.command {
        Command::Convert(command) => convert::run(&command),
        Command::Pull(command) => pull::run(global, &command),
        Command::Add(command) => add::run(global, &command),
        Command::Up(command) => up::run(global, &command),
        Command::Bundle(command) => bundle::run(global, &command),
        Command::Rm(command) => rm::run(global, &command),
        Command::Ls(command) => ls::run(global, &command),
        Command::Status(command) => status::run(global, &command),
        Command::Top(command) => top::run(global, &command),
        Command::Report(command) => report::run(global, &command),
        Command::Record(command) => record::run(global, &command),
        Command::Compare(command) => compare::run(global, &command),
        Command::Ready(command) => ready::run(global, &command),
        Command::Fill(command) => fill::run(global, &command),
        Command::Inspect(command) => inspect::run(&command),
        Command::Check(command) => check::run(&command),
        Command::Export(command) => export::run(&command),
        Command::Optimize(command) => optimize::run(&command),
        Command::Trace(command) => trace::run(&command),
        Command::Cache(command) => cache::run(global, &command),
        Command::Cdi(command) => cdi::run(global, &command),
        Command::Metrics(command) => metrics::run(global, &command),
        Command::Doctor(command) => doctor::run(&command),
        Command::Daemon(command) => daemon::run(global, &command),
        Command::Docs(command) => docs::run(&command),
        Command::Runtime(command) => runtime::run(global, &command),
        Command::Hook(command) => hook::run(global, &command),
        Command::MountInto(command) => mount_into::run(&command),
        Command::MountHelper(command) => mount_helper::run(global, command),
    }
}

/// The directories, absolute: the daemon has another working directory.
fn directories(global: &Global) -> anyhow::Result<Directories> {
    Ok(Directories { root: absolute(&global.root)?, run: absolute(&global.run_dir)? })
}

fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Error::caused(ErrorKind::Invalid, format!("{} is no path", path.display()), error).into())
}

/// The path as the kernel's mount table has it: absolute, without links, if it is there.
fn resolved(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    path.canonicalize().or_else(|_| absolute(path))
}

fn client_options(options: &RegistryOptions) -> ClientOptions {
    ClientOptions {
        plain_http: options.plain_http,
        auth_file: options.auth_file.clone(),
        hosts_dirs: options.hosts_dirs.clone(),
        ..ClientOptions::default()
    }
}

/// A reference, a layout's directory made absolute. No reference begins like a path, so a path is that of a layout.
fn location(text: &str) -> anyhow::Result<Location> {
    let is_path = text.starts_with(['/', '.']);
    let parsed = if is_path { format!("oci:{text}").parse()? } else { text.parse()? };
    Ok(match parsed {
        Location::Layout { dir, tag } => Location::Layout { dir: absolute(&dir)?, tag },
        other => other,
    })
}

/// The platform that was asked for, else this machine's.
fn platform(text: Option<&str>) -> anyhow::Result<Platform> {
    Ok(text.map(str::parse).transpose()?.unwrap_or_else(Platform::host))
}

/// An async runtime for commands that speak to registries themselves.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// The device that is mounted at `directory`, a path of [`resolved`], in this mount namespace; the topmost one.
fn mounted_device(directory: &Path) -> anyhow::Result<Option<mounts::DeviceNumber>> {
    let mounts = mounts::list()?;
    Ok(mounts.iter().rev().find(|mount| mount.mount_point == directory).map(|mount| mount.device))
}

/// An answer that does not fit the request: the daemon is of another version.
fn unexpected(answer: &Answer) -> anyhow::Error {
    Error::new(ErrorKind::Internal, format!("the daemon gave an answer that does not fit: {answer:?}")).into()
}
