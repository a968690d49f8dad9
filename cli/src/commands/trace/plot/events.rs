//! The events of a start: one JSON object a line, times in microseconds on one clock. Unknown keys and kinds of lines are
//! passed over, so that what writes them may say more.
//!
//! ```text
//! {"fetch":"trace","start_us":1200,"first_byte_us":21400,"end_us":30100,"bytes":1048576}   a request, when it ended
//! {"read":"late-hit","at_us":25000,"blocks":32,"stall_us":3100}     a device request that read a block for the first time
//! {"mark":"ready","at_us":901000}                                  a moment with a name
//! ```

use serde::Deserialize;
use ublkimg_driver::error::{Error, ErrorKind};

/// Most lines that are read: ten times what a large start has.
const LINES_MAX: usize = 1 << 20;

/// Why bytes were fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Class {
    Attach,
    Demand,
    Trace,
    ReadAhead,
    Fill,
    #[serde(other)]
    Other,
}

/// How the first read of a block went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    Hit,
    LateHit,
    Miss,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Event {
    Fetch {
        fetch: Class,
        start_us: u64,
        #[serde(default)]
        first_byte_us: Option<u64>,
        end_us: u64,
        bytes: u64,
    },
    Read {
        read: Outcome,
        at_us: u64,
        #[serde(default)]
        blocks: u64,
        #[serde(default)]
        stall_us: u64,
    },
    Mark {
        mark: String,
        at_us: u64,
    },
    Other(serde::de::IgnoredAny),
}

impl Event {
    /// When it began.
    pub(super) fn start_us(&self) -> Option<u64> {
        match self {
            Self::Fetch { start_us, .. } => Some(*start_us),
            Self::Read { at_us, .. } | Self::Mark { at_us, .. } => Some(*at_us),
            Self::Other(_) => None,
        }
    }

    /// When it was over.
    pub(super) fn end_us(&self) -> u64 {
        match self {
            Self::Fetch { end_us, .. } => *end_us,
            Self::Read { at_us, stall_us, .. } => at_us.saturating_add(*stall_us),
            Self::Mark { at_us, .. } => *at_us,
            Self::Other(_) => 0,
        }
    }

    fn shift(&mut self, by_us: u64) {
        match self {
            Self::Fetch { start_us, first_byte_us, end_us, .. } => {
                for time in [Some(start_us), first_byte_us.as_mut(), Some(end_us)].into_iter().flatten() {
                    *time = time.saturating_sub(by_us);
                }
            }
            Self::Read { at_us, .. } | Self::Mark { at_us, .. } => *at_us -= by_us,
            Self::Other(_) => {}
        }
    }
}

/// Reads the lines; the first event is then at 0.
pub(super) fn parse(bytes: &[u8]) -> anyhow::Result<Vec<Event>> {
    let mut events: Vec<Event> = Vec::new();
    let lines = bytes.split(|byte| *byte == b'\n').take(LINES_MAX).enumerate();
    for (number, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        let event: Event = serde_json::from_slice(line).map_err(|error| {
            Error::caused(ErrorKind::Invalid, format!("line {} is no event of a start", number + 1), error)
        })?;
        events.extend(Some(event).filter(|event| event.start_us().is_some()));
    }
    let first_us = events.iter().filter_map(Event::start_us).min();
    let first_us = first_us.ok_or_else(|| Error::new(ErrorKind::Invalid, "no events: there is nothing to draw"))?;
    events.iter_mut().for_each(|event| event.shift(first_us));
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_begin_at_zero() {
        let text = r#"{"mark":"attach","at_us":100}
            {"fetch":"read-ahead","start_us":150,"end_us":300,"bytes":4096,"new":1}
            {"fetch":"something new","start_us":150,"first_byte_us":200,"end_us":300,"bytes":1}

            {"unknown":true}
            {"read":"late-hit","at_us":160,"blocks":2,"stall_us":40}"#;
        let events = parse(text.as_bytes()).unwrap();
        assert_eq!(events.len(), 4);
        assert_eq!(events[0], Event::Mark { mark: "attach".to_owned(), at_us: 0 });
        let fetch =
            Event::Fetch { fetch: Class::ReadAhead, start_us: 50, first_byte_us: None, end_us: 200, bytes: 4096 };
        assert_eq!(events[1], fetch);
        assert_eq!(events[3], Event::Read { read: Outcome::LateHit, at_us: 60, blocks: 2, stall_us: 40 });
        assert_eq!(events[3].end_us(), 100);
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["{}", "{", "{\"mark\":\"a\",\"at_us\":1}\nnonsense"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
