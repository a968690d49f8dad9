//! An image as a FUSE file on a loop device, for kernels without ublk.
//!
//! ```text
//! EROFS ─► /dev/loopN ─(direct I/O)─► FUSE file ─► this process ─► store
//! ```
//! The file system is mounted below the run directory, in the server's own mount namespace: nobody else sees it. Both
//! kernel objects go with the process. The loop device clears itself when its last user closes it; while an image is still
//! mounted on it, it stays, and reads fail until that mount is gone. What remains after `kill -9` is an empty directory, which
//! the next server removes.

use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::fuse_file::{FILE_NAME, READ_LEN_MAX, ReplyPool, SESSION_THREADS, image_file};
use super::loop_device::{self, LoopDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::image::ServedImage;

/// Where FUSE servers connect.
pub(crate) const FUSE_PATH: &str = "/dev/fuse";
/// How long the session threads may take to see that the file system is gone.
const SESSION_END_TIMEOUT: Duration = Duration::from_secs(10);

/// A FUSE file system that is about to be mounted.
#[derive(Debug)]
pub struct PreparedFuse {
    image: Arc<ServedImage>,
    mount_point: PathBuf,
}

impl PreparedFuse {
    /// Checks what is needed. `directory` is created when missing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without FUSE or loop devices.
    pub fn new(image: Arc<ServedImage>, directory: &Path) -> Result<Self> {
        for (path, module) in [(FUSE_PATH, "fuse"), (loop_device::CONTROL_PATH, "loop")] {
            if !Path::new(path).exists() {
                let what = format!("{path} is missing: run `modprobe {module}`; a container needs the device");
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        }
        let mount_point = directory.join("fuse");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&mount_point)
            .map_err(|error| Error::path("create", &mount_point, error))?;
        Ok(Self { image, mount_point })
    }

    /// Serves it.
    ///
    /// # Errors
    /// See [`super::Prepared::start`].
    pub fn start(self) -> Result<FuseDevice> {
        let mount_point = &self.mount_point;
        let failed = |error| Error::path("mount FUSE on", mount_point, error);
        let (file_system, replies) = image_file(Arc::clone(&self.image)).map_err(failed)?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::RO,
            MountOption::FSName("ublkimg".into()),
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::CUSTOM(format!("max_read={READ_LEN_MAX}")),
        ];
        config.n_threads = Some(SESSION_THREADS);
        let session = Session::new(file_system, mount_point, &config).map_err(failed)?;
        let connection = session.as_fd().try_clone_to_owned().map_err(failed)?;
        let session = session.spawn().map_err(failed)?;
        let mut served = Served { session, replies, mount_point: mount_point.clone(), connection };
        let path = mount_point.join(FILE_NAME);
        let attached = File::open(&path)
            .map_err(|error| Error::path("open", &path, error))
            .and_then(|file| LoopDevice::attach(&file))
            .and_then(|device| served.outlive(&device).map(|()| device).map_err(failed));
        match attached {
            Ok(device) => Ok(FuseDevice { path: device.path().to_owned(), device, served }),
            Err(error) => {
                if let Err(error) = served.end() {
                    tracing::warn!(%error, "taking back a FUSE file");
                }
                Err(error)
            }
        }
    }
}

/// A device that answers reads.
#[derive(Debug)]
pub struct FuseDevice {
    path: PathBuf,
    device: LoopDevice,
    served: Served,
}

impl FuseDevice {
    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// See [`super::Device::stop`].
    ///
    /// # Errors
    /// See [`super::Device::stop`].
    pub fn stop(self) -> Result<()> {
        self.served.replies.stop_waiting();
        let free = self.device.detach();
        self.served.end()?;
        if free {
            return Ok(());
        }
        let what = format!("{} is still held; it is free when its last user closes it", self.path.display());
        Err(Error::new(ErrorKind::Busy, what))
    }

    /// See [`super::Device::abandon`].
    pub fn abandon(self) {
        // Dropping the session would unmount; the process is about to end.
        std::mem::forget(self);
    }
}

/// The mounted file system and its threads.
struct Served {
    session: BackgroundSession,
    replies: ReplyPool,
    mount_point: PathBuf,
    connection: OwnedFd,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("mount_point", &self.mount_point).finish_non_exhaustive()
    }
}

impl Served {
    /// Lets the kernel abort the connection before it clears the loop device when this process is killed. Otherwise the
    /// loop device would wait for a read that nobody answers any more, and the process would never end. The kernel closes
    /// files in the order of their numbers and finishes the last one first, so our last number must be the higher one.
    fn outlive(&mut self, device: &LoopDevice) -> std::io::Result<()> {
        self.connection = rustix::io::fcntl_dupfd_cloexec(&self.connection, device.as_raw_fd() + 1)?;
        Ok(())
    }

    /// Aborts the connection, which ends the session threads whoever holds the file; then waits for them.
    fn end(self) -> Result<()> {
        self.replies.stop_waiting();
        match rustix::mount::unmount(&self.mount_point, UnmountFlags::FORCE | UnmountFlags::DETACH) {
            // Somebody else has unmounted it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(Error::path("unmount", &self.mount_point, error.into())),
        }
        let deadline = Instant::now() + SESSION_END_TIMEOUT;
        while !self.session.guard.is_finished() {
            if Instant::now() >= deadline {
                let what = format!("the FUSE session on {} does not end", self.mount_point.display());
                return Err(Error::new(ErrorKind::TimedOut, what));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // The session would unmount once more what was unmounted above.
        if let Err(error) = self.session.umount_and_join()
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            tracing::warn!(%error, mount_point = %self.mount_point.display(), "a FUSE session ended with an error");
        }
        self.replies.join();
        std::fs::remove_dir(&self.mount_point).map_err(|error| Error::path("remove", &self.mount_point, error))
    }
}
