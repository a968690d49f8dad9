//! What the documentation says to type is what the program takes: every `ublkimg ...` of its pages is parsed here.
//!
//! In a code block a command must be complete; between backquotes in a sentence it may be only its beginning. That the commands also
//! work is for `tests/tests/cli_documentation.rs`, and for the tests that the pages name.

use clap::Parser;
use clap::error::ErrorKind;

use super::Arguments;

/// A command and where it stands.
struct Written {
    place: String,
    words: Vec<String>,
}

/// The pages, from the root of the workspace.
fn pages() -> Vec<(String, String)> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut names = vec!["README.md".to_owned(), "ARCHITECTURE.md".to_owned()];
    for directory in ["docs", "docs/decisions"] {
        let files = std::fs::read_dir(root.join(directory)).unwrap().map(|entry| entry.unwrap().file_name());
        let pages = files.map(|name| name.into_string().unwrap()).filter(|name| name.ends_with(".md"));
        names.extend(pages.map(|name| format!("{directory}/{name}")));
    }
    names.into_iter().map(|name| (name.clone(), std::fs::read_to_string(root.join(&name)).unwrap())).collect()
}

/// The commands in blocks of code, and those in sentences.
fn commands_of(name: &str, text: &str) -> (Vec<Written>, Vec<Written>) {
    let (mut in_blocks, mut in_sentences) = (Vec::new(), Vec::new());
    let mut block: Option<&str> = None;
    for (number, line) in (1..).zip(text.replace("\\\n", "  ").lines()) {
        let place = format!("{name}:{number}");
        if let Some(language) = line.trim_start().strip_prefix("```") {
            block = if block.is_some() { None } else { Some(if language == "console" { "$ " } else { "" }) };
        } else if let Some(prompt) = block {
            let Some(command) = line.trim_start().strip_prefix(prompt) else { continue };
            in_blocks.extend(commands(command).into_iter().map(|words| Written { place: place.clone(), words }));
        } else {
            let quoted = line.split('`').skip(1).step_by(2).flat_map(commands);
            in_sentences.extend(quoted.map(|words| Written { place: place.clone(), words }));
        }
    }
    (in_blocks, in_sentences)
}

/// What a line of shell would call this program with. Other lines give nothing.
fn commands(line: &str) -> Vec<Vec<String>> {
    // Operators are words of their own, whatever stands beside them; those in quotes are not at the end of a word here.
    let line = line.replace("; ", " ; ").replace('|', " | ");
    let Some(words) = shlex::split(&line) else { return Vec::new() };
    let calls = words.split(|word| matches!(word.as_str(), "&&" | "||" | "|" | ";" | "!"));
    let without_redirection = |call: &[String]| -> Vec<String> {
        let end = call.iter().position(|word| word.starts_with('>') || word.starts_with("2>")).unwrap_or(call.len());
        call[..end].iter().skip_while(|word| word.contains('=')).cloned().collect()
    };
    let calls = calls.map(without_redirection);
    calls.filter(|call| call.first().is_some_and(|program| program == "ublkimg")).collect()
}

fn parsed(written: &Written) -> Result<(), clap::Error> {
    Arguments::try_parse_from(&written.words).map(drop)
}

#[test]
fn every_command_of_the_documentation_is_one() {
    let (mut wrong, mut counted) = (Vec::new(), 0);
    for (name, text) in pages() {
        let (in_blocks, in_sentences) = commands_of(&name, &text);
        counted += in_blocks.len();
        for written in in_blocks {
            if let Err(error) = parsed(&written) {
                wrong.push(format!("{}: {:?}: {}", written.place, written.words, error.kind()));
            }
        }
        for written in in_sentences {
            use ErrorKind::{
                DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand as NoWord, MissingRequiredArgument,
                MissingSubcommand,
            };
            match parsed(&written).map_err(|error| error.kind()) {
                Ok(()) | Err(DisplayHelp | NoWord | MissingRequiredArgument | MissingSubcommand) => {}
                Err(kind) => wrong.push(format!("{}: {:?}: {kind}", written.place, written.words)),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(counted > 40, "only {counted} commands were found");
}

#[test]
fn a_command_is_found_where_a_shell_would_find_it() {
    let found = |line: &str| commands(line).into_iter().map(|words| words.join(" ")).collect::<Vec<_>>();
    assert_eq!(found("UBLKIMG_LOG=info ublkimg ls >x && ublkimg rm a # b; ublkimg"), ["ublkimg ls", "ublkimg rm a"]);
    assert_eq!(found("umount /mnt; ublkimg rm 'a;b' | cat"), ["ublkimg rm a;b"]);
    assert_eq!(found("runc run ublkimg"), [""; 0]);
    let (in_blocks, in_sentences) =
        commands_of("x", "`ublkimg a` and `b`\n```console\n$ ublkimg c\nublkimg d\n```\n```\nublkimg e\n```\n");
    let [blocks, sentences] =
        [in_blocks, in_sentences].map(|found| found.into_iter().map(|one| one.words[1].clone()).collect::<Vec<_>>());
    assert_eq!((blocks, sentences), (vec!["c".to_owned(), "e".to_owned()], vec!["a".to_owned()]));
}
