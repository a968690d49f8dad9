//! The process that pushes.

#![expect(unsafe_code, reason = "fork")]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use ublkimg_image::trace::FileMap;
use ublkimg_image::{BLOCK_SIZE, read_tree};

use super::feed::Run;
use super::memory::{self, Budget};
use super::pieces::{FilePieces, of_files};
use crate::daemon::protocol::{Answer, Request};
use crate::daemon::{Directories, client};
use crate::error::{Error, ErrorKind, Result};

/// How long nothing may arrive before it is given up.
const QUIET_MAX: Duration = Duration::from_secs(10);

/// How often it is asked whether more has arrived.
const POLL: Duration = Duration::from_millis(20);

/// The server answers from memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel takes up to one request of the device for each advice and drops the rest: this is what every device takes.
const STEP_BYTES: u64 = 128 << 10;

/// What a warmer has to know.
#[derive(Debug, Clone)]
pub struct Warmer {
    /// Where the server is.
    pub directories: Directories,
    /// The device's name.
    pub name: String,
    /// The device.
    pub device: PathBuf,
    /// Length of the metadata, with which the device begins.
    pub metadata_bytes: u64,
    /// Where the image is mounted.
    pub mount: PathBuf,
}

/// Goes on as a process of its own, without terminal, standard streams and working directory, in which this returns true; in
/// the caller it returns false. Must be called while the process has one thread.
///
/// # Errors
/// [`ErrorKind::Io`].
pub fn go_on_alone() -> Result<bool> {
    let failed = |error| Error::io("go on in the background", error);
    // SAFETY: there is one thread, so no lock is held by another that the child would not have.
    match unsafe { libc::fork() } {
        -1 => return Err(failed(io::Error::last_os_error())),
        0 => {}
        _ => return Ok(false),
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
    rustix::process::setsid().map_err(|errno| failed(errno.into()))?;
    for standard in 0..3 {
        // SAFETY: both are descriptors, and nobody owns the standard ones.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    rustix::process::chdir("/").map_err(|errno| failed(errno.into()))?;
    Ok(true)
}

impl Warmer {
    /// Pushes until there is nothing left to do.
    ///
    /// # Errors
    /// What ended it early; nobody but a log is interested.
    pub fn run(&self) -> Result<()> {
        let mut runs = self.ask()?;
        if runs.is_none() {
            return Ok(());
        }
        let metadata = self.metadata()?;
        let (tree, geometry) =
            read_tree(&metadata).map_err(|error| Error::caused(ErrorKind::Corrupt, "metadata of the device", error))?;
        drop(metadata);
        let map = FileMap::new(&tree, &geometry);
        let (mut budget, mut last) = (Budget::here(), Instant::now());
        while let Some(turn) = runs {
            if turn.is_empty() {
                if last.elapsed() > QUIET_MAX {
                    break;
                }
                std::thread::sleep(POLL);
            } else {
                let blocks: usize = turn.iter().map(ExactSizeIterator::len).sum();
                if !budget.take((blocks * BLOCK_SIZE) as u64) || memory::is_short_here() {
                    break;
                }
                for file in of_files(&map, geometry.metadata_blocks, &turn) {
                    self.push(&map, &file);
                }
                last = Instant::now();
            }
            runs = self.ask()?;
        }
        Ok(())
    }

    /// The runs that are to be pushed now; none when it is over.
    fn ask(&self) -> Result<Option<Vec<Run>>> {
        match client::ask(&self.directories, &Request::Warm { name: self.name.clone() }, ANSWER_TIMEOUT)? {
            Some(Answer::Warm(runs)) => Ok(runs),
            _ => Ok(None),
        }
    }

    fn metadata(&self) -> Result<Vec<u8>> {
        let device = File::open(&self.device).map_err(|error| Error::path("open", &self.device, error))?;
        let mut metadata = vec![0; usize::try_from(self.metadata_bytes).unwrap_or(0)];
        device.read_exact_at(&mut metadata, 0).map_err(|error| Error::path("read", &self.device, error))?;
        Ok(metadata)
    }

    /// Has the kernel read pieces of a file. What cannot be is left to the reader, who gets the error if there is one.
    fn push(&self, map: &FileMap<'_>, file: &FilePieces) {
        let path = self.mount.join(OsStr::from_bytes(&map.path(file.file)));
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOATIME;
        let Ok(open) = OpenOptions::new().read(true).custom_flags(flags).open(path) else { return };
        for piece in &file.pieces {
            let mut at = piece.start;
            while let Some(left) = NonZeroU64::new(piece.end - at) {
                let step = left.min(NonZeroU64::new(STEP_BYTES).unwrap_or(left));
                if rustix::fs::fadvise(&open, at, Some(step), Advice::WillNeed).is_err() {
                    return;
                }
                at += step.get();
            }
        }
    }
}
