//! `ublkimg hook`: what an OCI runtime calls while it makes and ends a container (runtime specification, "Lifecycle").
//!
//! | phase | what happens |
//! |---|---|
//! | prestart, createRuntime | the images of the annotations are attached, leased, and mounted in the container |
//! | createContainer | they must be there: a runtime calls it inside the container's control group, which lets nobody open a device |
//! | poststart | the root's device counts as ready, if an annotation says so |
//! | poststop | leases are given back; devices that were attached for containers go with the last of them |
//!
//! A hook cannot supply the root itself: runtimes look at it before they call one. `ublkimg bundle` can.
//!
//! Phases can be repeated, since runtimes call both prestart and createRuntime when both are configured: a path that is
//! mounted already is left alone. An error is one line on stderr and one in the journal, as some runtimes drop a hook's
//! stderr. poststop never fails: nothing would come of it. Each phase ends by itself after its `--timeout` and says so, rather than being
//! killed by a runtime that knows no more than that it took long.

mod journal;
mod state;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ublkimg_driver::daemon::protocol::{AddRequest, DeviceStatus, FillMode, Request, StartOptions};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::device::QueueOptions;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::Sha256;
use ublkimg_registry::usual_credential_files;

pub(super) use self::state::{MOUNT_PREFIX, POSTSTOP, REMOVE, ROOT};

use self::state::State;
use super::{add, mount_helper, mount_into, rm, status};
use crate::args::Global;
use crate::args::hook::Hook;
use crate::lease::{Leases, Process};
use crate::{exit, output};

/// How long the daemon may take for something small.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// How much longer than attaching and mounting a phase may take in all.
const GRACE: Duration = Duration::from_secs(2);

pub(super) fn run(global: &Global, command: &Hook) -> anyhow::Result<()> {
    let done = within(command.timeout + GRACE, global, command);
    if let Err(error) = &done {
        journal::error(&format!("hook {}: {error:#}", command.phase));
    }
    match command.phase.as_str() {
        POSTSTOP => Ok(()),
        _ => done,
    }
}

/// What becomes of a call for which not even the configuration can be read: the same as of any other.
pub(crate) fn could_not_begin(error: &anyhow::Error, words: &[String]) -> ExitCode {
    journal::error(&format!("{}: {error:#}", words.join(" ")));
    // A runtime that cannot hand over the state may take that for a hook that failed.
    if !std::io::stdin().is_terminal() {
        let _ = State::read(std::io::stdin().lock());
    }
    if words.iter().any(|word| word == POSTSTOP) { ExitCode::SUCCESS } else { exit::code(error) }
}

/// Whether the words of a command line, which could not be understood, call for a phase.
pub(crate) fn is_called_by(words: &[String]) -> bool {
    const PHASES: [&str; 5] = ["prestart", "createRuntime", "createContainer", "poststart", POSTSTOP];
    words.iter().skip_while(|word| *word != "hook").any(|word| PHASES.contains(&word.as_str()))
}

/// The phase, on a thread of its own: it may wait for a lock or a file system that hangs, and the process ends without it.
fn within(limit: Duration, global: &Global, command: &Hook) -> anyhow::Result<()> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let arguments = (global.clone(), command.clone());
    std::thread::spawn(move || tell.send(phase(&arguments.0, &arguments.1)));
    let late = |_| {
        let text =
            format!("{} was not done within {}s; `ublkimg status` says what waits", command.phase, limit.as_secs());
        Err(Error::new(ErrorKind::TimedOut, text).into())
    };
    told.recv_timeout(limit).unwrap_or_else(late)
}

fn phase(global: &Global, command: &Hook) -> anyhow::Result<()> {
    let state = State::read(std::io::stdin().lock())?;
    let hook = Call { global, command, directories: super::directories(global)?, state };
    if command.dry_run {
        return hook.tell();
    }
    match command.phase.as_str() {
        "prestart" | "createRuntime" => hook.prepare(),
        "createContainer" => hook.look(),
        "poststart" => hook.started(),
        "poststop" => hook.stopped(),
        _ => Ok(()),
    }
}

/// One call of a hook.
struct Call<'a> {
    global: &'a Global,
    command: &'a Hook,
    directories: Directories,
    state: State,
}

impl Call<'_> {
    /// What the phase would do, one step a line.
    fn tell(&self) -> anyhow::Result<()> {
        let root = self.state.root_device();
        match self.command.phase.as_str() {
            "prestart" | "createRuntime" => {
                if let Some(name) = root {
                    output::line(&format!("lease {name} for {}", self.state.id))?;
                }
                for (path, reference) in self.state.mounts() {
                    let name = self.request(reference)?.name.unwrap_or_default();
                    output::line(&format!(
                        "attach {reference} as {name}, lease it for {}, mount it at {path}",
                        self.state.id
                    ))?;
                }
            }
            "poststart" => {
                if let Some(name) = root.filter(|_| self.state.is_ready_when_started()) {
                    output::line(&format!("{name} is ready"))?;
                }
            }
            "poststop" => {
                let mut names: Vec<String> = root.map(str::to_owned).into_iter().collect();
                for (_path, reference) in self.state.mounts() {
                    names.push(self.request(reference)?.name.unwrap_or_default());
                }
                for name in names {
                    output::line(&format!("give back the lease of {} on {name}", self.state.id))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// From outside the container.
    fn prepare(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + self.command.timeout;
        if let Some(name) = self.state.root_device() {
            status::find(&self.directories, name)?;
            let leases = Leases::of(&self.directories, name);
            let _lock = leases.lock()?;
            leases.take(&self.state.id, self.process()?)?;
        }
        let mounts = self.state.mounts();
        if mounts.is_empty() {
            return Ok(());
        }
        let rootfs = self.state.rootfs()?;
        for (path, reference) in mounts {
            self.mount(path, reference, &rootfs, deadline)?;
        }
        Ok(())
    }

    /// From inside the container's mount namespace, and its control group, which lets nobody open a device: what an earlier phase
    /// mounted must be there.
    fn look(&self) -> anyhow::Result<()> {
        let mounts = self.state.mounts();
        if mounts.is_empty() {
            return Ok(());
        }
        let rootfs = self.state.rootfs()?;
        for (path, reference) in mounts {
            if !mount_into::is_mount(&rootfs, path)? {
                let text = format!(
                    "{reference} is not mounted at {path} in the container: that is for the phase createRuntime, which this \
                     container's hooks lack"
                );
                return Err(Error::new(ErrorKind::NotFound, text).into());
            }
        }
        Ok(())
    }

    /// Who lives as long as the container does.
    fn process(&self) -> anyhow::Result<Process> {
        let pid = self.state.pid.unwrap_or(0);
        let gone = || Error::new(ErrorKind::NotFound, format!("the container's process {pid} is not there"));
        Ok(Process::of(pid).ok_or_else(gone)?)
    }

    fn mount(&self, path: &str, reference: &str, rootfs: &std::path::Path, deadline: Instant) -> anyhow::Result<()> {
        let request = self.request(reference)?;
        // The same image at two paths, or in two containers, is one device.
        let name = request.name.clone().unwrap_or_default();
        let leases = Leases::of(&self.directories, &name);
        let _lock = leases.lock()?;
        let place = self.place(&name);
        let left = deadline.saturating_duration_since(Instant::now());
        let target = add::Target::Directory(&place);
        add::attach(self.global, &self.directories, request, &target, left)?;
        leases.take(&self.state.id, self.process()?)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let (source, root) = (place.display().to_string(), rootfs.display().to_string());
        let pid = self.state.pid.map(|pid| format!("--pid={pid}"));
        let words = ["mount-into"].into_iter().chain(pid.as_deref()).chain(["--", &source, &root, path]);
        mount_helper::run_own(words, &format!("mounting {reference} at {path} in the container"), left)
    }

    fn request(&self, reference: &str) -> anyhow::Result<AddRequest> {
        let reference = super::location(reference)?.to_string();
        Ok(AddRequest {
            name: Some(device_name(&reference)),
            reference,
            transport: add::transport(self.command.transport),
            queue: QueueOptions::default(),
            plain_http: self.command.registry.plain_http,
            auth_file: self.command.registry.auth_file.as_deref().map(super::absolute).transpose()?,
            credential_files: usual_credential_files(),
            hosts_dirs: self.command.registry.hosts_dirs.clone(),
            attach_timeout_ms: add::milliseconds(self.command.timeout),
            read_timeout_ms: add::milliseconds(self.command.io_timeout),
            holds_reads: false,
            verity: false,
            start: StartOptions { fill: FillMode::Off, record: true, ..StartOptions::default() },
        })
    }

    /// Where a hook mounts a device, in the host's mount namespace.
    fn place(&self, name: &str) -> PathBuf {
        self.directories.run.join("hook").join(name)
    }

    fn started(&self) -> anyhow::Result<()> {
        match self.state.root_device() {
            Some(name) if self.state.is_ready_when_started() => {
                Ok(client::ask(&self.directories, &Request::Ready { name: name.to_owned() }, ASK_TIMEOUT).map(drop)?)
            }
            _ => Ok(()),
        }
    }

    fn stopped(&self) -> anyhow::Result<()> {
        // Each by itself: what cannot be removed must not keep the others.
        let mut failed = match self.state.root_device() {
            Some(name) if self.state.takes_root_along() => self.let_go(name),
            Some(name) => Leases::of(&self.directories, name).give_back(&self.state.id).map(drop),
            None => Ok(()),
        };
        for (_path, reference) in self.state.mounts() {
            failed =
                failed.and(self.request(reference).and_then(|request| self.let_go(&request.name.unwrap_or_default())));
        }
        failed
    }

    fn let_go(&self, name: &str) -> anyhow::Result<()> {
        let leases = Leases::of(&self.directories, name);
        let _lock = leases.lock()?;
        leases.give_back(&self.state.id)?;
        if leases.holder().is_some() {
            return Ok(());
        }
        let device = match status::find(&self.directories, name) {
            Ok(device) => device,
            // It was removed, or never attached.
            Err(error) if is_not_found(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.remove(&device)?;
        leases.forget();
        Ok(())
    }

    fn remove(&self, device: &DeviceStatus) -> anyhow::Result<()> {
        rm::remove_patiently(&self.directories, device, false)?;
        let _ = std::fs::remove_dir(self.place(&device.name));
        Ok(())
    }
}

/// The name of the device that hooks attach for a reference: no two references have the same.
fn device_name(reference: &str) -> String {
    let hash = Sha256::of(reference.as_bytes()).to_string();
    let digits: String = hash.trim_start_matches("sha256:").chars().take(16).collect();
    format!("hook-{digits}")
}

pub(super) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}
