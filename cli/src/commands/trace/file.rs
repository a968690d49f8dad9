//! Trace files on disk: whole or not at all.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::Context;
use ublkimg_convert::{load_trace, store_trace};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::trace::Trace;

/// Longest file that is read, in bytes: four times what a stored trace may have, as events are text.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Reads and checks a trace.
pub(in crate::commands) fn load(path: &Path) -> anyhow::Result<Trace> {
    parse(path, &read(path)?)
}

/// The trace in the bytes of the file `path`.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> anyhow::Result<Trace> {
    load_trace(bytes).with_context(|| path.display().to_string())
}

/// The bytes of a file; `-` is stdin.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |error| open_failed("read", path, error);
    let limit_bytes = FILE_BYTES_MAX + 1;
    if path == Path::new("-") {
        std::io::stdin().take(limit_bytes).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(path).and_then(|file| file.take(limit_bytes).read_to_end(&mut bytes)).map_err(failed)?;
    }
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let text = format!("{} is longer than {FILE_BYTES_MAX} bytes", path.display());
        return Err(Error::new(ErrorKind::Invalid, text).into());
    }
    Ok(bytes)
}

/// Writes a trace.
pub(super) fn save(path: &Path, trace: &Trace) -> anyhow::Result<()> {
    write(path, &store_trace(trace)?)
}

/// Puts a file in its place when all of it is written.
pub(super) fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let failed = |error| open_failed("write", path, error);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It may not be there; the first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    }
    Ok(written.map_err(failed)?)
}

fn open_failed(verb: &str, path: &Path, error: std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    Error::caused(kind, format!("cannot {verb} {}", path.display()), error)
}
