//! Rules of the repository that no compiler checks: who may depend on whom, how long files and functions are, where
//! `unsafe` may stand, what text must not say, that exit codes are documented. (Links in Markdown: `doc-links.sh`.)

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod arrows;
mod exit_codes;
mod guarantees;
mod index;
mod repository;
mod source;

use repository::{files, read};

/// The longest Rust file.
const FILE_LINES: usize = 600;

/// The longest function, from `fn` to its last brace.
const FUNCTION_LINES: usize = 70;

#[track_caller]
fn assert_none(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}:\n  {}", violations.join("\n  "));
}

#[test]
fn files_are_short() {
    let long = files(&["rs"]).into_iter().filter_map(|file| {
        let lines = read(&file).lines().count();
        (lines > FILE_LINES).then(|| format!("{file}: {lines} lines"))
    });
    assert_none(&format!("at most {FILE_LINES} lines a file; one noun each"), &long.collect::<Vec<_>>());
}

#[test]
fn functions_are_short() {
    let long = files(&["rs"]).into_iter().flat_map(|file| {
        let functions = source::functions(&source::code_only(&read(&file)));
        functions.into_iter().filter(|function| function.lines > FUNCTION_LINES).map(move |function| {
            format!("{file}:{}: {} has {} lines", function.first_line, function.name, function.lines)
        })
    });
    assert_none(&format!("at most {FUNCTION_LINES} lines a function"), &long.collect::<Vec<_>>());
}

#[test]
fn unsafe_only_in_the_driver() {
    // Its examples measure how it does something: they need what it needs.
    let is_driver = |file: &String| file.starts_with("driver/src/") || file.starts_with("driver/examples/");
    let violations = files(&["rs"]).into_iter().filter(|file| !is_driver(file)).flat_map(|file| {
        let code = source::code_only(&read(&file));
        let lines = source::lines_with_word(&code, "unsafe");
        lines.into_iter().map(move |line| format!("{file}:{line}"))
    });
    assert_none("`unsafe` only in the driver", &violations.collect::<Vec<_>>());
}

#[test]
fn other_crates_forbid_unsafe() {
    let roots = files(&["rs"]).into_iter().filter(|file| {
        let in_crate = file.split_once('/').map(|(_, path)| path);
        matches!(in_crate, Some("src/lib.rs" | "src/main.rs")) && !file.starts_with("driver/")
    });
    let violations = roots.filter(|file| !read(file).contains("#![forbid(unsafe_code)]"));
    assert_none("#![forbid(unsafe_code)] is missing", &violations.collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_to_be_done_or_of_one_machine() {
    // Put together here, or this file would name them.
    let words = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"]].map(|parts| parts.concat());
    let paths = [["/wo", "rk/"], ["/tmp/", "wt"], ["/tmp/", "t/"], ["/ro", "ot/."]].map(|parts| parts.concat());
    let violations = files(&["rs", "md", "toml", "sh", "yml", "Makefile", "run"]).into_iter().flat_map(|file| {
        let text = read(&file);
        let marked = words.iter().flat_map(|word| source::lines_with_word(&text, word));
        let local = paths.iter().flat_map(|path| source::lines_with(&text, path));
        marked.chain(local).map(|line| format!("{file}:{line}")).collect::<Vec<_>>()
    });
    assert_none("a mark of unfinished work, or a path of one machine", &violations.collect::<Vec<_>>());
}

#[test]
fn crates_depend_downwards_only() {
    assert_none("dependencies against the table", &arrows::violations());
}

#[test]
fn exit_codes_are_documented() {
    let documented = exit_codes::of_readme(&read("README.md"));
    assert!(documented.len() > 2, "{documented:?}");
    assert_eq!(documented, exit_codes::of_help(&read("cli/src/args.rs")), "README.md, and the help");
}
