//! Which mounts of a device unmounting it here would leave elsewhere.
//!
//! A service with a mount namespace of its own (systemd-udevd, any unit with a sandbox) has a copy of each mount of the host, and
//! loses it when the host unmounts: mounts propagate (mount_namespaces(7)). The kernel goes by the mount *below*. Whatever is
//! unmounted from a place of it is unmounted from the same place of its peers (in mountinfo `shared:N`), of their slaves
//! (`master:N`), of their slaves' peers, and so on. What is mounted where nothing arrives from here, as a container's own mounts are,
//! stays, and keeps the device busy.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::mounts::{self, DeviceNumber, Holder, Mount};

/// A mount of the device in another namespace.
struct Copy {
    pid: u32,
    namespace: u64,
    mount_point: PathBuf,
    below: Option<Below>,
}

/// What a mount lies on.
struct Below {
    /// Peer group of the mount below.
    shared: Option<u32>,
    /// Peer group from which the mount below receives.
    master: Option<u32>,
    /// Place in its file system.
    place: PathBuf,
}

/// The mounts of the device in other namespaces that stay when all of this namespace are unmounted; one holder for each.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn out_of_reach(device: DeviceNumber) -> Result<Vec<Holder>> {
    let own_namespace = Path::new("/proc/self/ns/mnt");
    let here = own_namespace.metadata().map_err(|error| Error::path("look at", own_namespace, error))?.ino();
    let own = mounts::list()?;
    let mut sources = HashSet::new();
    for below in own.iter().filter(|mount| mount.device == device).filter_map(|mount| below(&own, mount)) {
        sources.extend(below.shared.map(|group| (group, below.place)));
    }
    let (mut copies, mut slaves) = (Vec::new(), slaves(&own));
    for (pid, namespace, table) in mounts::tables()?.filter(|(_, namespace, _)| *namespace != here) {
        slaves.extend(self::slaves(&table));
        copies.extend(table.iter().filter(|mount| mount.device == device).map(|mount| Copy {
            pid,
            namespace,
            mount_point: mount.mount_point.clone(),
            below: below(&table, mount),
        }));
    }
    spread(&mut sources, &slaves);
    copies.retain(|copy| !copy.below.as_ref().is_some_and(|below| receives(below, &sources)));
    let holder = |copy: Copy| Holder { namespace: copy.namespace, pid: copy.pid, mount_points: vec![copy.mount_point] };
    Ok(copies.into_iter().map(holder).collect())
}

/// `None` when the process does not see what is below.
fn below(table: &[Mount], mount: &Mount) -> Option<Below> {
    let parent = table.iter().find(|parent| parent.id == mount.parent_id)?;
    let place = parent.root.join(mount.mount_point.strip_prefix(&parent.mount_point).ok()?);
    Some(Below { shared: parent.shared, master: parent.master, place })
}

/// Mounts that hand on what they receive: from which peer group, to which.
fn slaves(table: &[Mount]) -> HashSet<(u32, u32)> {
    table.iter().filter_map(|mount| Some((mount.master?, mount.shared?))).collect()
}

/// Adds the places to which an unmount at one of the places is handed on.
fn spread(sources: &mut HashSet<(u32, PathBuf)>, slaves: &HashSet<(u32, u32)>) {
    let mut new: Vec<_> = sources.iter().cloned().collect();
    // Each pair is added once, and there are not more of them than places times groups.
    while let Some((group, place)) = new.pop() {
        for (_, to) in slaves.iter().filter(|(from, _)| *from == group) {
            if sources.insert((*to, place.clone())) {
                new.push((*to, place.clone()));
            }
        }
    }
}

fn receives(below: &Below, sources: &HashSet<(u32, PathBuf)>) -> bool {
    [below.shared, below.master].into_iter().flatten().any(|group| sources.contains(&(group, below.place.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether unmounting what lies on `/mnt/image` of peer group 1 takes along what lies there.
    fn goes(shared: Option<u32>, master: Option<u32>, place: &str, slaves: &[(u32, u32)]) -> bool {
        let mut sources = HashSet::from([(1, PathBuf::from("/mnt/image"))]);
        spread(&mut sources, &slaves.iter().copied().collect());
        receives(&Below { shared, master, place: place.into() }, &sources)
    }

    #[test]
    fn peers_slaves_and_slaves_of_slaves_receive() {
        assert!(goes(Some(1), None, "/mnt/image", &[]));
        assert!(goes(None, Some(1), "/mnt/image", &[]));
        assert!(goes(Some(7), Some(1), "/mnt/image", &[]));
        assert!(goes(Some(9), Some(7), "/mnt/image", &[(1, 7), (7, 1)]));
    }

    #[test]
    fn others_do_not() {
        assert!(!goes(None, None, "/mnt/image", &[(1, 7)]), "private");
        assert!(!goes(Some(2), Some(3), "/mnt/image", &[(1, 7)]), "of another group");
        assert!(!goes(None, Some(1), "/srv/image", &[]), "elsewhere");
        assert!(!goes(Some(7), None, "/mnt/image", &[(7, 1)]), "nothing is handed up");
    }

    #[test]
    fn a_place_is_one_of_the_file_system_below() {
        let mount = |id, parent_id, root: &str, mount_point: &str| Mount {
            id,
            parent_id,
            device: DeviceNumber { major: 0, minor: 1 },
            root: root.into(),
            mount_point: mount_point.into(),
            shared: Some(id),
            master: None,
            fs_type: String::new(),
            source: PathBuf::new(),
            super_options: String::new(),
        };
        let table = [mount(1, 0, "/data", "/srv"), mount(2, 1, "/", "/srv/image")];
        let below = below(&table, &table[1]).unwrap();
        assert_eq!((below.shared, below.place), (Some(1), "/data/image".into()));
        assert!(super::below(&table, &table[0]).is_none());
    }
}
