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
    let failed = |error: &anyhow::Error| eprintln!("ublkimg: {}", exit::one_line(error));
    let arguments = match config::arguments().map_err(anyhow::Error::from) {
        Ok(arguments) => arguments,
        Err(error) => {
            failed(&error);
            let words: Vec<String> = std::env::args().skip(1).collect();
            return if commands::hook::is_called_by(&words) {
                commands::hook::could_not_begin(&error, &words)
            } else {
                exit::code(&error)
            };
        }
    };
    log::start(&arguments.global);
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            failed(&error);
            exit::code(&error)
        }
    }
}
