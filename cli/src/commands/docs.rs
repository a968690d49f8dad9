//! `ublkimg docs`: man pages, completions and a sample configuration from the definition of the command line.

use std::fs;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::{Arguments, Docs};

pub(super) fn run(command: &Docs) -> anyhow::Result<()> {
    let directory = &command.directory;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    clap_mangen::generate_to(Arguments::command(), directory)
        .with_context(|| format!("cannot write man pages to {}", directory.display()))?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Arguments::command(), "ublkimg", directory)
            .with_context(|| format!("cannot write completions to {}", directory.display()))?;
    }
    let sample = directory.join("config.toml");
    fs::write(&sample, crate::config::sample()).with_context(|| format!("cannot write {}", sample.display()))
}
