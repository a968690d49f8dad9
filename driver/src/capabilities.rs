//! What the server and its threads may do: they drop what they do not need, for good.
//!
//! A server that is root without its privileges can still read its store and make devices, and no more: no modules, no
//! clock, no network set-up, no signals to others. Kernel modules are loaded by its guard before it starts.
//!
//! A queue thread needs nothing at all, since its files are open. That it has no CAP_SYS_ADMIN when it fetches its first
//! requests has an effect that is wanted: the kernel does not scan a device for partitions whose server is not trusted
//! (`GD_SUPPRESS_PART_SCAN`, from Linux 6.1 on). On 6.12 a server that is killed while that scan waits for it hangs in the
//! kernel for ever, and the device with it; so no device of ours is scanned.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities};

use crate::error::{Error, Result};

/// SYS_ADMIN: ublk, loop devices, mounts of FUSE files. DAC_OVERRIDE: credentials and roots of other users. SYS_RESOURCE:
/// PR_SET_IO_FLUSHER of each queue thread, and the blocks that a file system keeps for root.
const NEEDED: CapabilitySet =
    CapabilitySet::SYS_ADMIN.union(CapabilitySet::DAC_OVERRIDE).union(CapabilitySet::SYS_RESOURCE);

/// Drops all but what a server needs, also for the programs that it starts (credential helpers). Before threads are
/// started: each has its own.
///
/// # Errors
/// [`crate::ErrorKind::Io`]; a user who is not root has nothing to drop.
pub(crate) fn keep_needed() -> Result<()> {
    let cannot = |error: Errno| Error::io("cannot drop capabilities", error.into());
    rustix::thread::set_no_new_privs(true).map_err(cannot)?;
    let had = rustix::thread::capabilities(None).map_err(cannot)?;
    if had.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(NEEDED).iter() {
            match remove_capability_from_bounding_set(capability) {
                // The kernel does not know it.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(cannot(error)),
            }
        }
    }
    keep(NEEDED).map_err(cannot)
}

/// Drops all capabilities of this thread.
pub(crate) fn drop_all_of_this_thread() -> std::io::Result<()> {
    Ok(keep(CapabilitySet::empty())?)
}

fn keep(kept: CapabilitySet) -> rustix::io::Result<()> {
    let had = rustix::thread::capabilities(None)?;
    let (effective, permitted) = (had.effective.intersection(kept), had.permitted.intersection(kept));
    set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_drops_its_own_and_nobody_elses() {
        let before = rustix::thread::capabilities(None).unwrap().effective;
        let dropped = std::thread::spawn(|| {
            keep(NEEDED).unwrap();
            let needed = rustix::thread::capabilities(None).unwrap();
            drop_all_of_this_thread().unwrap();
            (needed.effective, rustix::thread::capabilities(None).unwrap())
        });
        let (needed, none) = dropped.join().unwrap();
        assert_eq!(needed, before.intersection(NEEDED));
        assert!(none.effective.is_empty() && none.permitted.is_empty());
        assert_eq!(rustix::thread::capabilities(None).unwrap().effective, before);
    }
}
