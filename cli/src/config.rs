//! The configuration file: other defaults for options.
//!
//! Every option that has an environment variable is a key of the file, called like the option. The file changes nothing but
//! the option's *default*, before the command line is read, so what wins is clap's own rule: the option, then the variable,
//! then the file, then what is built in. There is no second list of settings that could differ from the first.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory, FromArgMatches, Parser};
use toml::{Table, Value};
use ublkimg_driver::error::{Error, ErrorKind, Result};

use crate::args::Arguments;

/// Read if it is there and no other file is named.
pub(crate) const DEFAULT_PATH: &str = "/etc/ublkimg/config.toml";
/// The option that names the file cannot be in it.
const CONFIG: &str = "config";
/// What container tools call to run a container.
const RUNTIME_NAME: &str = "ublkimg-runc";
/// A longer file is not one of ours.
const MAX_BYTES: u64 = 64 << 10;
/// Between words that have this much in common (0 to 1) a typing error is likely.
const LIKELY: f64 = 0.7;

/// The command line over the environment over the file. Ends the process, as clap does it, for `--help` and bad usage.
///
/// # Errors
/// `Invalid` for a file with an unknown key or an impossible value, `Io` when a named one cannot be read.
pub(crate) fn arguments() -> Result<Arguments> {
    let words = words_of(std::env::args_os().collect());
    let arguments = Arguments::parse_from(&words);
    let path = arguments.global.config.clone();
    let Some(file) = File::read(path.as_deref())? else { return Ok(arguments) };
    // The command line was good without the file: what is wrong now is in the file.
    let matches = file.apply(Arguments::command()).try_get_matches_from(&words);
    matches.and_then(|matches| Arguments::from_arg_matches(&matches)).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        file.refuse(line)
    })
}

/// The program under its other name is one of its commands, and all that follows is for that.
fn words_of(words: Vec<OsString>) -> Vec<OsString> {
    let name = words.first().and_then(|program| Path::new(program).file_name());
    if name.is_none_or(|name| name != RUNTIME_NAME) {
        return words;
    }
    ["ublkimg", "runtime", "--"].map(OsString::from).into_iter().chain(words.into_iter().skip(1)).collect()
}

/// What a file says: words for options, by the option's name.
#[derive(Debug)]
struct File {
    path: PathBuf,
    words: BTreeMap<String, Vec<String>>,
}

impl File {
    fn read(named: Option<&Path>) -> Result<Option<Self>> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match read_bounded(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
            Ok(text) => text,
        };
        Self::parse(path, &text).map(Some)
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut file = Self { path: path.to_owned(), words: BTreeMap::new() };
        let table: Table = toml::from_str(text).map_err(|error| file.syntax(text, &error))?;
        let known = keys(&Arguments::command());
        for (key, value) in &table {
            if !known.contains_key(key) {
                return Err(file.unknown(key, known.keys()));
            }
            let words = words(value).ok_or_else(|| file.refuse(&format!("{key} is neither text nor a number")))?;
            file.words.insert(key.clone(), words);
        }
        Ok(file)
    }

    /// The definition with the file's defaults.
    fn apply(&self, command: Command) -> Command {
        command.mut_args(|arg| self.with_default(arg)).mut_subcommands(|command| self.apply(command))
    }

    fn with_default(&self, arg: Arg) -> Arg {
        let Some(words) = key(&arg).and_then(|key| self.words.get(key)) else { return arg };
        // clap keeps defaults as long as the program runs.
        arg.default_values(words.iter().map(|word| &*word.clone().leak()))
    }

    fn unknown<'a>(&self, key: &str, known: impl Iterator<Item = &'a String>) -> Error {
        let alike = |known: &&String| strsim::jaro_winkler(key, known);
        let nearest = known.max_by(|a, b| alike(a).total_cmp(&alike(b))).filter(|nearest| alike(nearest) > LIKELY);
        let hint = nearest.map_or_else(String::new, |nearest| format!(": is {nearest} meant?"));
        self.refuse(&format!("unknown key {key}{hint}"))
    }

    fn syntax(&self, text: &str, error: &toml::de::Error) -> Error {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        self.refuse(&format!("line {line}: {}", error.message().replace('\n', ", ")))
    }

    fn refuse(&self, what: &str) -> Error {
        Error::new(ErrorKind::Invalid, format!("{}: {what}", self.path.display()))
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// The key of an option, if it has one.
fn key(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| arg.get_env().is_some() && *long != CONFIG)
}

/// All keys, each with its option; one that several commands have is there once.
pub(crate) fn keys(command: &Command) -> BTreeMap<String, Arg> {
    let mut found: BTreeMap<_, _> = command.get_subcommands().flat_map(keys).collect();
    found.extend(command.get_arguments().filter_map(|arg| Some((key(arg)?.to_owned(), arg.clone()))));
    found
}

/// A value as it would be written on the command line.
fn words(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Integer(number) => Some(vec![number.to_string()]),
        Value::Array(values) => values.iter().map(|value| value.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// A file with all keys, none of them set, for the administrator to edit.
pub(crate) fn sample() -> String {
    let mut text =
        "# Defaults for options of ublkimg. An option on the command line and its variable in the environment win.\n"
            .to_owned();
    for (key, arg) in keys(&Arguments::command()) {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let variable = arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let default =
            arg.get_default_values().first().map_or_else(String::new, |value| value.to_string_lossy().into_owned());
        text.push_str(&format!("\n# {help}. ${variable}\n# {key} = {default:?}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<File> {
        File::parse(Path::new("c.toml"), text)
    }

    fn add(file: &File, words: &[&str]) -> crate::args::Add {
        let words = [&["ublkimg", "add", "r/x"], words].concat();
        let matches = file.apply(Arguments::command()).try_get_matches_from(words).unwrap();
        match Arguments::from_arg_matches(&matches).unwrap().command {
            crate::args::Command::Add(add) => add,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_default_is_all_that_it_changes() {
        let file = parse("io-timeout = \"5s\"\nfill = 'idle'\nattach-timeout = 7").unwrap();
        let from_file = add(&file, &[]);
        assert_eq!((from_file.attach.io_timeout.as_secs(), from_file.attach.timeout.as_secs()), (5, 7));
        assert_eq!(from_file.attach.fill, crate::args::FillArgument::Idle);
        assert_eq!(add(&file, &["--io-timeout", "9s"]).attach.io_timeout.as_secs(), 9);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, what) in [
            ("io-timeot = \"5s\"", "c.toml: unknown key io-timeot: is io-timeout meant?"),
            ("config = \"x\"", "c.toml: unknown key config"),
            ("zzz = 1", "c.toml: unknown key zzz"),
            ("root = {}", "c.toml: root is neither text nor a number"),
            ("\nroot = ", "c.toml: line 2: "),
        ] {
            let said = parse(text).unwrap_err().to_string();
            assert!(said.starts_with(what), "{said}");
        }
    }

    #[test]
    fn a_key_is_one_variable_everywhere() {
        fn check(command: &Command, known: &BTreeMap<String, Arg>) {
            for arg in command.get_arguments() {
                let same = arg.get_long().and_then(|long| known.get(long));
                if let (Some(same), Some(_)) = (same, key(arg)) {
                    let facts =
                        |arg: &Arg| (arg.get_env().map(ToOwned::to_owned), format!("{:?}", arg.get_default_values()));
                    assert_eq!(facts(arg), facts(same), "{arg}");
                }
            }
            command.get_subcommands().for_each(|command| check(command, known));
        }
        check(&Arguments::command(), &keys(&Arguments::command()));
    }

    #[test]
    fn all_keys_are_documented_and_nothing_else() {
        let page = include_str!("../../docs/configuration.md");
        let (_, table) = page.split_once("\n| key and option |").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let documented: BTreeMap<_, _> = rows.collect();
        let known = keys(&Arguments::command());
        assert_eq!(documented.keys().collect::<Vec<_>>(), known.keys().collect::<Vec<_>>());
        for (key, arg) in known {
            let row = documented[&*key];
            let variable = arg.get_env().unwrap().to_str().unwrap();
            let default = arg.get_default_values().first().map_or("", |value| value.to_str().unwrap());
            assert!(row.contains(&format!("`{variable}`")) && row.contains(default), "{key}: {row}");
        }
    }

    #[test]
    fn the_sample_sets_nothing_and_names_all() {
        let sample = sample();
        assert!(parse(&sample).unwrap().words.is_empty());
        assert!(sample.contains("\n# io-timeout = \"300s\"\n"), "{sample}");
    }
}
