//! What was measured: figures of several rounds, beside the bar that they are to meet.

use std::fmt;

use serde::Serialize;
use ublkimg_bench::median;

/// What a figure is to be.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
    /// Printed for what it tells about others.
    None,
}

impl Bar {
    fn is_met(self, figure: f64) -> Option<bool> {
        match self {
            Self::AtMost(bar) => Some(figure <= bar),
            Self::AtLeast(bar) => Some(figure >= bar),
            Self::None => None,
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bar) => write!(f, "≤ {bar}"),
            Self::AtLeast(bar) => write!(f, "≥ {bar}"),
            Self::None => write!(f, "-"),
        }
    }
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    /// The figure of each round.
    pub(crate) rounds: Vec<f64>,
    pub(crate) bar: Bar,
    /// What it was made of: name, unit, and the value of each round.
    pub(crate) parts: Vec<Part>,
}

/// A measurement that a figure is made of.
#[derive(Debug, Serialize)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) rounds: Vec<f64>,
}

impl Row {
    /// The ratio of the first part to the second, round by round.
    pub(crate) fn ratio(
        what: &str,
        unit: &'static str,
        bar: Bar,
        ours: (&str, Vec<f64>),
        other: (&str, Vec<f64>),
    ) -> Self {
        let rounds = ours.1.iter().zip(&other.1).map(|(ours, other)| ours / other).collect();
        let part = |(name, rounds): (&str, Vec<f64>)| Part { name: name.to_owned(), unit, rounds };
        Self { what: what.to_owned(), rounds, bar, parts: vec![part(ours), part(other)] }
    }

    /// A figure that stands for itself.
    pub(crate) fn of(what: impl Into<String>, rounds: Vec<f64>, bar: Bar) -> Self {
        Self { what: what.into(), rounds, bar, parts: Vec::new() }
    }

    /// The same, made of this too.
    pub(crate) fn with(mut self, name: &str, unit: &'static str, rounds: Vec<f64>) -> Self {
        self.parts.push(Part { name: name.to_owned(), unit, rounds });
        self
    }
}

/// The median and, of more than one, the extremes.
fn spread(values: &[f64]) -> String {
    if values.is_empty() {
        return "-".to_owned();
    }
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(least, most), v| (least.min(*v), most.max(*v)));
    match values.len() {
        1 => Short(values[0]).to_string(),
        _ => format!("{} ({} to {})", Short(median(values)), Short(least), Short(most)),
    }
}

/// Three digits that count.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.0.abs() {
            size if size >= 100.0 => 0,
            size if size >= 10.0 => 1,
            _ => 2,
        };
        write!(f, "{:.digits$}", self.0)
    }
}

/// The rows as a table in Markdown.
pub(crate) struct Table<'a>(pub(crate) &'a [Row]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| | median (least to most) | bar | met | of |\n|---|---|---|---|---|")?;
        for row in self.0 {
            let is_met = (!row.rounds.is_empty()).then(|| row.bar.is_met(median(&row.rounds))).flatten();
            let met = is_met.map_or("", |is_met| if is_met { "yes" } else { "**no**" });
            let parts = row.parts.iter().map(|part| format!("{} {} {}", part.name, spread(&part.rounds), part.unit));
            let parts = parts.collect::<Vec<_>>().join("; ");
            writeln!(f, "| {} | {} | {} | {met} | {parts} |", row.what, spread(&row.rounds), row.bar)?;
        }
        Ok(())
    }
}
