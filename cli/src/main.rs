//! `ublkimg`: arguments, output and exit codes; everything else is in the library crates.

#![forbid(unsafe_code)]

mod args;
mod bundle;
mod cdi;
mod commands;
mod config;
mod exit;
mod lease;
mod output;
mod overlay;
mod progress;
mod svg;

use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = config::arguments().map_err(anyhow::Error::from).and_then(|arguments| {
        start_log(&arguments.global.log);
        commands::run(arguments)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ublkimg: {}", exit::one_line(&error));
            exit::code(&error)
        }
    }
}

/// Logs go to stderr, so that stdout holds results only.
fn start_log(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(filter);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
