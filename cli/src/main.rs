//! `ublkimg`: arguments, output and exit codes; everything else is in the library crates.

#![forbid(unsafe_code)]

mod args;
mod bundle;
mod cdi;
mod commands;
mod config;
mod exit;
mod lease;
mod log;
mod output;
mod overlay;
mod page;
mod progress;
mod svg;

use std::process::ExitCode;

fn main() -> ExitCode {
    let done = config::arguments().map_err(anyhow::Error::from).and_then(|arguments| {
        log::start(&arguments.global);
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
