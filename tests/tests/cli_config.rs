//! The configuration file against the environment and the command line.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use ublkimg_tests::command::{Invocation, Outcome, ublkimg_path};

/// Each place that can name the store names another one, which cannot be; the one that is refused is the one that won.
fn cache_ls(config: &Path, variable: Option<&str>, option: Option<&str>) -> Outcome {
    let mut command = Invocation::new(ublkimg_path()).env("UBLKIMG_CONFIG", config).args(["cache", "ls"]);
    if let Some(path) = variable {
        command = command.env("UBLKIMG_ROOT", path);
    }
    command.args(option.iter().flat_map(|path| ["--root", path])).run()
}

fn config(directory: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = directory.path().join("config.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn the_option_wins_over_the_variable_over_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    let file = config(&directory, &format!("root = '/proc/of-file'\nrun-dir = '{}'", run.display()));
    let refused = |variable, option, names: &str| {
        let outcome = cache_ls(&file, variable, option);
        assert_ne!(outcome.code, Some(0));
        outcome.refused(outcome.code.unwrap(), &[names]);
    };
    refused(None, None, "/proc/of-file");
    refused(Some("/proc/of-variable"), None, "/proc/of-variable");
    refused(Some("/proc/of-variable"), Some("/proc/of-option"), "/proc/of-option");
}

#[test]
fn what_is_wrong_in_the_file_is_one_line() {
    let directory = tempfile::tempdir().unwrap();
    for (text, what) in [
        ("io-timeot = '5s'", "unknown key io-timeot: is io-timeout meant?"),
        ("io-timeout = '5 parsecs'", "--io-timeout"),
        ("root = ", "line 1"),
    ] {
        let file = config(&directory, text);
        let add = Invocation::new(ublkimg_path()).args(["add", "r/x", "--config"]).arg(&file).run();
        add.refused(2, &[file.to_str().unwrap(), what]);
    }
    let missing = directory.path().join("missing.toml");
    cache_ls(&missing, None, None).refused(12, &[missing.to_str().unwrap()]);
}
