//! `ublkimg trace`: traces as things that can be looked at, merged, drawn and passed on. One module a command.

mod diff;
mod file;
mod from_list;
mod image;
mod merge;
pub(super) mod plot;
mod pull;
mod push;
pub(super) mod show;

pub(super) use file::load;
pub(super) use image::Named;

use ublkimg_convert::Dropped;

use crate::args::trace::{Trace, TraceCommand};

pub(super) fn run(command: &Trace) -> anyhow::Result<()> {
    match &command.command {
        TraceCommand::Show(command) => show::run(command),
        TraceCommand::Merge(command) => merge::run(command),
        TraceCommand::Diff(command) => diff::run(command),
        TraceCommand::Plot(command) => plot::run(command),
        TraceCommand::Push(command) => push::run(command),
        TraceCommand::Pull(command) => pull::run(command),
        TraceCommand::FromList(command) => from_list::run(command),
    }
}

/// Tells of blocks that are not used.
pub(super) fn warn_dropped(dropped: &Dropped, kept: u64) {
    let lost = dropped.other_blobs + dropped.past_end;
    if lost > 0 {
        let all = lost + kept;
        eprintln!("ublkimg: {lost} of {all} traced blocks are in no layer of this image and were left out");
    }
}

/// A command for people: its arguments, quoted where a shell would need it.
fn command_text(command: &[String]) -> String {
    if command.is_empty() {
        return "(unknown)".to_owned();
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    let words = command.iter().map(|word| match !word.is_empty() && word.chars().all(is_plain) {
        true => word.clone(),
        false => format!("{word:?}"),
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_quoted_where_a_shell_would_need_it() {
        assert_eq!(command_text(&["a".to_owned(), "b c".to_owned(), String::new()]), r#"a "b c" """#);
    }
}
