//! What a test may leave behind without noticing: mounts, loop devices, ublk devices, processes.
//!
//! Several tests run at once on one machine, so each looks only at what names its own directory, but for ublk devices,
//! which name nothing: these are counted where a test has the machine for itself.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Mounts of this mount namespace with their mount point or source below `root`, in the order of mounting.
pub fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mounts = table.split(|byte| *byte == b'\n').filter_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let separator = fields.iter().position(|field| *field == b"-")?;
        let (point, source) = (path(fields.get(4)?), path(fields.get(separator + 2)?));
        (point.starts_with(root) || source.starts_with(root)).then_some(point)
    });
    mounts.collect()
}

/// A path of the mount table, where space, tab, newline and backslash are octal escapes.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = std::str::from_utf8(tail.get(..3).unwrap_or_default()).ok();
        match code.filter(|_| *first == b'\\').and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Loop devices whose file lies (or lay) below `root`.
pub fn loop_devices_below(root: &Path) -> Vec<String> {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten().filter_map(|entry| {
        let file = std::fs::read(entry.path().join("loop/backing_file")).ok()?;
        let is_below = PathBuf::from(OsString::from_vec(file)).starts_with(root);
        is_below.then(|| entry.file_name().to_string_lossy().into_owned())
    });
    devices.collect()
}

/// Processes other than this that name `root` in their command line, or have it as their working or root directory, or
/// have a file below it open. Each with its command line.
pub fn processes_of(root: &Path) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read(entry.path().join("cmdline")).ok().filter(|command| !command.is_empty())?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let links = ["cwd", "root"].map(|name| entry.path().join(name));
        let files = std::fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten().map(|fd| fd.path());
        let mut paths = links.into_iter().chain(files).filter_map(|link| std::fs::read_link(link).ok());
        let is_of_root = command.contains(&*root.to_string_lossy()) || paths.any(|path| path.starts_with(root));
        (is_of_root && id != std::process::id()).then(|| format!("{id} {}", command.trim_end()))
    });
    processes.collect()
}

/// The ublk devices of this machine.
pub fn ublk_devices() -> Vec<String> {
    let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let mut names: Vec<String> = devices
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.strip_prefix("ublkb").or(name.strip_prefix("ublkc")).is_some_and(is_number))
        .collect();
    names.sort();
    names
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// All that is left of a test in `root`, as sentences; empty when there is nothing.
pub fn left_behind(root: &Path) -> Vec<String> {
    let mounts = mounts_below(root).into_iter().map(|mount| format!("mount {}", mount.display()));
    let loops = loop_devices_below(root).into_iter().map(|device| format!("loop device {device}"));
    let processes = processes_of(root).into_iter().map(|process| format!("process {process}"));
    mounts.chain(loops).chain(processes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::temp_root::TempRoot;

    #[test]
    fn escapes_of_the_mount_table() {
        assert_eq!(path(b"/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(path(b"/a\\04"), Path::new("/a\\04"));
    }

    #[test]
    fn a_process_is_found_while_it_runs() {
        let root = TempRoot::new().unwrap();
        let file = std::fs::File::create(root.join("in")).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
        let is_named = |pid: u32| !std::fs::read(format!("/proc/{pid}/cmdline")).unwrap().is_empty();
        while !is_named(child.id()) {
            std::thread::yield_now();
        }
        let found = left_behind(root.path());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [format!("process {} sleep 60", child.id())]);
        assert_eq!(left_behind(root.path()), Vec::<String>::new());
    }
}
