//! `ublkimg up`: the images that this host is to have. Each is a file `NAME.toml` with a `reference` and options of `add`, and is
//! added by a command of its own, so that a bad one holds up nothing and means what it would mean on a command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use toml::{Table, Value};
use ublkimg_driver::error::{Error, ErrorKind};

use super::daemon;
use crate::args::Global;
use crate::args::up::Up;
use crate::output;

/// A longer file names no image.
const FILE_MAX_BYTES: u64 = 64 << 10;

pub(super) fn run(global: &Global, command: &Up) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let mut failed: Option<Error> = None;
    for path in files(command)? {
        let words = match words(&path) {
            Ok(words) => words,
            Err(error) => {
                tell(failed.replace(error));
                continue;
            }
        };
        if command.dry_run {
            output::line(&format!("ublkimg {}", words.join(" ")))?;
            continue;
        }
        let mut add = Command::new(std::env::current_exe()?);
        daemon::pass_global(&mut add, global, &directories);
        let status = add.args(words).status()?;
        if !status.success() {
            // It has said itself what is wrong.
            let kind = status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal);
            tell(failed.replace(Error::new(kind, format!("not all images are there: {} failed", path.display()))));
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// The last error ends the command; those before it are said here.
fn tell(error: Option<Error>) {
    if let Some(error) = error {
        eprintln!("ublkimg: {error}");
    }
}

/// In the order of their names.
fn files(command: &Up) -> anyhow::Result<Vec<PathBuf>> {
    let directory = &command.images_dir;
    if !command.name.is_empty() {
        return Ok(command.name.iter().map(|name| directory.join(format!("{name}.toml"))).collect());
    }
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::path("read", directory, error).into()),
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    paths.sort();
    Ok(paths)
}

/// The command line that a file stands for.
fn words(path: &Path) -> Result<Vec<String>, Error> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(FILE_MAX_BYTES).read_to_string(&mut text));
    read.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("there is no {}", path.display())),
        _ => Error::path("read", path, error),
    })?;
    let refuse = |what: &str| Error::new(ErrorKind::Invalid, format!("{}: {what}", path.display()));
    let mut table: Table = toml::from_str(&text).map_err(|error| refuse(&error.message().replace('\n', ", ")))?;
    let Some(Value::String(reference)) = table.remove("reference") else { return Err(refuse("it names no reference")) };
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut words = vec!["add".to_owned(), format!("--name={name}")];
    for (key, value) in &table {
        words.extend(match value {
            Value::Boolean(true) => Some(format!("--{key}")),
            Value::Boolean(false) => None,
            Value::String(text) => Some(format!("--{key}={text}")),
            Value::Integer(number) => Some(format!("--{key}={number}")),
            _ => return Err(refuse(&format!("{key} is neither text, a number, true nor false"))),
        });
    }
    words.extend(["--".to_owned(), reference]);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn of(text: &str) -> Result<Vec<String>, Error> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights.toml");
        std::fs::write(&path, text).unwrap();
        words(&path)
    }

    #[test]
    fn a_file_is_a_command_line() {
        let text = "reference = 'r/x:1'\nmount = '/mnt/x y'\noverlay = true\nno-record = false\nread-ahead-kb = 64\n";
        let words = of(text).unwrap();
        assert_eq!(
            words,
            ["add", "--name=weights", "--mount=/mnt/x y", "--overlay", "--read-ahead-kb=64", "--", "r/x:1"]
        );
        assert!(crate::args::Arguments::try_parse_from([vec!["ublkimg".to_owned()], words].concat()).is_ok());
        for (text, what) in
            [("mount = '/m'", "no reference"), ("reference = 'r'\nmount = []", "mount"), ("x", "weights.toml")]
        {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains("weights.toml: ") && error.contains(what), "{error}");
        }
    }
}
