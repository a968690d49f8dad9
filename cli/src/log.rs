//! Where logs go: to stderr, so that stdout holds results only, or to systemd's journal.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::{Global, LogFormat};

pub(crate) fn start(global: &Global) {
    let filter = EnvFilter::builder().parse_lossy(&global.log);
    let to_stderr = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match global.log_format {
        LogFormat::Text => to_stderr.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => to_stderr.json().flatten_event(true).init(),
        LogFormat::Journal => match tracing_journald::layer() {
            Ok(journal) => {
                let journal = journal.with_field_prefix(Some("UBLKIMG".to_owned()));
                let filter = EnvFilter::builder().parse_lossy(&global.log);
                tracing_subscriber::registry().with(filter).with(journal).init();
            }
            Err(error) => {
                to_stderr.with_target(false).init();
                tracing::warn!("there is no journal here, so logs go to stderr: {error}");
            }
        },
    }
}
