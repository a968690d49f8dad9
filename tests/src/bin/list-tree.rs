//! Prints a directory tree, one line per object in byte order of the paths: everything that an image must preserve, the
//! content as its SHA-256. Two trees are the same when their lists are. Static and quick, for guests without tools.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(1) else {
        eprintln!("usage: list-tree DIR");
        return ExitCode::from(2);
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let listed = list(Path::new(&root), Path::new(""), &mut out).and_then(|()| Ok(out.flush()?));
    if let Err(error) = listed {
        eprintln!("list-tree: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Lists `root/path` and what is below it.
fn list(root: &Path, path: &Path, out: &mut impl Write) -> Result<()> {
    let full = root.join(path);
    let directory = line(&full, path, out).with_context(|| format!("cannot read {}", full.display()))?;
    if !directory {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&full).with_context(|| format!("cannot list {}", full.display()))? {
        names.push(entry.with_context(|| format!("cannot list {}", full.display()))?.file_name());
    }
    names.sort_unstable();
    names.iter().try_for_each(|name| list(root, &path.join(name), out))
}

/// Writes the line of one object; returns whether it is a directory.
fn line(full: &Path, path: &Path, out: &mut impl Write) -> Result<bool> {
    let meta = std::fs::symlink_metadata(full)?;
    let kind = meta.file_type();
    let permissions = meta.mode() & 0o7777;
    write!(out, "{} {permissions:04o} {}:{} ", escaped(path.as_os_str()), meta.uid(), meta.gid())?;
    write!(out, "{}.{:09} links={} ", meta.mtime(), meta.mtime_nsec(), meta.nlink())?;
    if kind.is_file() {
        write!(out, "file {} {}", meta.size(), content(full)?)?;
    } else if kind.is_dir() {
        write!(out, "directory")?;
    } else if kind.is_symlink() {
        write!(out, "symlink {}", escaped(std::fs::read_link(full)?.as_os_str()))?;
    } else if kind.is_fifo() {
        write!(out, "fifo")?;
    } else if kind.is_socket() {
        write!(out, "socket")?;
    } else {
        let name = if kind.is_block_device() { "block" } else { "char" };
        write!(out, "{name} {}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))?;
    }
    for (name, value) in attributes(full)? {
        write!(out, " {}={}", escaped(OsStr::from_bytes(&name)), escaped(OsStr::from_bytes(&value)))?;
    }
    writeln!(out)?;
    Ok(kind.is_dir())
}

fn content(path: &Path) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(&buffer[..count]);
    }
}

fn attributes(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for name in xattr::list(path)? {
        if let Some(value) = xattr::get(path, &name)? {
            found.insert(name.as_bytes().to_vec(), value);
        }
    }
    Ok(found)
}

/// Spaces and everything outside printable ASCII as `\xNN`, so that a line is a line.
fn escaped(text: &OsStr) -> String {
    let mut out = String::new();
    for &byte in text.as_bytes() {
        if byte.is_ascii_graphic() && byte != b'\\' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if out.is_empty() { ".".to_owned() } else { out }
}
