//! The daemon: one server process for many devices, a guard beside it, and the client that commands use.
//!
//! ```text
//! ublkimg add ──(Unix socket, one JSON line each way)──► server ──► attach, store, devices
//!      │                                                   ▲
//!      └─ starts ► guard (`ublkimg daemon`) ── restarts ───┘
//! ```
//! The split is by how processes may fail. The **server** holds devices and never touches a file system that it serves.
//! The **guard** holds nothing but the server's process: it starts it again when it dies, and when that does not help it
//! deletes the server's devices, so that readers get EIO instead of waiting for ever. Whatever may block in the kernel on
//! a served file system (mount, umount) runs in short-lived processes of the **caller**, in the caller's mount namespace.
//!
//! Invariant: a device's record ([`state::DeviceRecord`]) is on disk before the device starts and is removed after the
//! device is gone, so a server that is started again knows every device that it must take back.

mod attached;
pub mod cache;
pub mod client;
mod descriptors;
pub mod guard;
mod leftovers;
mod listener;
mod locks;
mod names;
mod notify;
mod pace;
pub mod protocol;
mod recording;
mod recovery;
mod server;
mod server_process;
mod start;
pub mod state;
pub mod takeover;

pub use names::from_reference as device_name;
pub use server::{ServerOptions, pull_here, run_server};

use std::path::{Path, PathBuf};

/// Where the daemon keeps its things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// Survives a reboot: the store and the device records. Default `/var/lib/ublkimg`.
    pub root: PathBuf,
    /// Gone after a reboot: the socket, the guard's lock, the log. Default `/run/ublkimg`.
    pub run: PathBuf,
}

impl Directories {
    /// The server's Unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run.join("daemon.sock")
    }

    /// Locked by the guard as long as it lives.
    #[must_use]
    pub fn guard_lock(&self) -> PathBuf {
        self.run.join("guard.lock")
    }

    /// Log of a daemon that `add` started; one started by hand logs to its own stderr.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.run.join("daemon.log")
    }

    /// Records of the devices, one file each.
    #[must_use]
    pub fn devices(&self) -> PathBuf {
        self.root.join("devices")
    }

    /// Mount points of the FUSE files of the fallback transport.
    #[must_use]
    pub fn fuse(&self) -> PathBuf {
        self.run.join("fuse")
    }

    /// Creates both directories, private to their owner.
    ///
    /// # Errors
    /// The path that could not be created, with the cause.
    pub fn create(&self) -> Result<(), (PathBuf, std::io::Error)> {
        use std::os::unix::fs::DirBuilderExt;
        for dir in [&self.root, &self.run, &self.devices(), &self.fuse()] {
            let dir: &Path = dir;
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|error| (dir.to_path_buf(), error))?;
        }
        Ok(())
    }
}
