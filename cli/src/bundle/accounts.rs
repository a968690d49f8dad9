//! The accounts of an image: names of users and groups as numbers. The files are the image's: bounded, and never followed
//! out of it.

use std::io::Read as _;
use std::path::Path;

use ublkimg_driver::error::{Error, ErrorKind};

/// An account file of an image is not longer; a longer one is not read.
const ACCOUNTS_BYTES_MAX: u64 = 1 << 20;

/// Groups beyond the first that a user can have: the kernel's `NGROUPS_MAX` is larger, no image needs it.
const GROUPS_MAX: usize = 256;

/// Who a process runs as.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// What `etc/group` adds, for users that it names.
    pub(crate) more_gids: Vec<u32>,
}

/// The numbers of `USER[:GROUP]`, each a number or a name of the image; root if it is empty.
///
/// # Errors
/// [`ErrorKind::Invalid`] for a name that the image does not have.
pub(crate) fn user(text: &str, rootfs: &Path) -> anyhow::Result<User> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let unknown = |what: &str| Error::new(ErrorKind::Invalid, format!("user {text:?}: no such {what} in the image"));
    let (uid, own_gid) = match user.parse::<u32>() {
        _ if user.is_empty() => (0, 0),
        Ok(uid) => (uid, 0),
        Err(_) => account(rootfs, user).ok_or_else(|| unknown("user"))?,
    };
    match group {
        None => Ok(User { uid, gid: own_gid, more_gids: groups_of(rootfs, user) }),
        Some(group) => {
            let gid = group.parse().ok().or_else(|| group_number(rootfs, group));
            Ok(User { uid, gid: gid.ok_or_else(|| unknown("group"))?, more_gids: Vec::new() })
        }
    }
}

/// A file of the image: links in it lead nowhere out of it.
fn read(rootfs: &Path, file: &str) -> Option<String> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    // A pipe is not waited for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let root =
        rustix::fs::openat(CWD, rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let file = rustix::fs::openat2(&root, file, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let file = std::fs::File::from(file);
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > ACCOUNTS_BYTES_MAX {
        return None;
    }
    std::io::read_to_string(file.take(ACCOUNTS_BYTES_MAX)).ok()
}

/// The fields of the line of `name` in an account file.
fn fields<'a>(text: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    Some(line.split(':').collect())
}

fn account(rootfs: &Path, name: &str) -> Option<(u32, u32)> {
    let text = read(rootfs, "etc/passwd")?;
    let fields = fields(&text, name)?;
    Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
}

fn group_number(rootfs: &Path, name: &str) -> Option<u32> {
    fields(&read(rootfs, "etc/group")?, name)?.get(2)?.parse().ok()
}

fn groups_of(rootfs: &Path, name: &str) -> Vec<u32> {
    if name.is_empty() {
        return Vec::new();
    }
    let text = read(rootfs, "etc/group").unwrap_or_default();
    let lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let of_user = lines.filter(|fields| fields.get(3).is_some_and(|users| users.split(',').any(|user| user == name)));
    of_user.filter_map(|fields| fields.get(2)?.parse().ok()).take(GROUPS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_number_and_name() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:\nweb:x:33:34::/:\nbad:x\n").unwrap();
        std::fs::write(root.path().join("etc/group"), "root:x:0:\nstaff:x:50:other,web\nvideo:x:44:web\n").unwrap();
        let user = |text| user(text, root.path());
        for (text, (uid, gid), more) in [
            ("", (0, 0), &[][..]),
            ("1000", (1000, 0), &[]),
            ("1000:7", (1000, 7), &[]),
            ("web", (33, 34), &[50, 44]),
            ("web:staff", (33, 50), &[]),
            ("web:9", (33, 9), &[]),
        ] {
            assert_eq!(user(text).unwrap(), User { uid, gid, more_gids: more.to_vec() }, "{text}");
        }
        for text in ["nobody", "bad", "web:none"] {
            assert!(user(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_link_out_of_the_image_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert!(user("root", root.path()).is_err());
        // Nor where the directory is one; one that stays within is.
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "web:x:33:34::/:\n").unwrap();
        let etc = root.path().join("etc");
        std::fs::remove_dir_all(&etc).unwrap();
        std::os::unix::fs::symlink(outside.path(), &etc).unwrap();
        assert!(user("web", root.path()).is_err());
        std::fs::create_dir(root.path().join("lib")).unwrap();
        std::fs::copy(outside.path().join("passwd"), root.path().join("lib/passwd")).unwrap();
        std::fs::remove_file(&etc).unwrap();
        std::os::unix::fs::symlink("/lib", &etc).unwrap();
        assert_eq!(user("web", root.path()).unwrap().uid, 33);
    }
}
