//! What the simulator is asked, and how its answers are written down.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use ublkimg_scheduler::Estimate;
use ublkimg_scheduler::simulate::{
    DemandOnly, Fifo, Link, Ours, Outcome, Plan, Policy, Program, Recording, Scenario, SimulatedImage, simulate,
};

use crate::traces::{Run, Workload};

/// Requests at a time of the policy that others have.
const FIFO_CONNECTIONS: usize = 16;

/// Of the random trace.
const SEED: u64 = 3;

const BLOCK_BYTES: u64 = 4096;

/// A link and its name.
#[derive(Debug, Clone, Copy)]
pub struct NamedLink {
    /// As printed.
    pub name: &'static str,
    /// The link.
    pub link: Link,
}

/// The links that starts are simulated over.
pub const LINKS: [NamedLink; 3] = [
    named_link("100 Mbit/s 20 ms", 100.0, 20),
    named_link("1 Gbit/s 20 ms", 1000.0, 20),
    named_link("1 Gbit/s 1 ms", 1000.0, 1),
];

const fn named_link(name: &'static str, mbit_per_s: f64, round_trip_ms: u64) -> NamedLink {
    let round_trip = Duration::from_millis(round_trip_ms);
    NamedLink { name, link: Link { bandwidth_bytes_per_s: mbit_per_s * 125_000.0, round_trip } }
}

/// What is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The layer's chunks; the reads are those of the kernel's read-ahead.
    Chunks,
    /// The frames of a hot blob, and the layer's chunks for blocks outside; the reads are the exact ones.
    Packed,
}

impl Layout {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Chunks, Self::Packed];

    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Chunks => "chunks-256k",
            Self::Packed => "packed",
        }
    }

    /// The recording of a run that belongs to this layout.
    #[must_use]
    pub fn recording(self, workload: &Workload, run: &Run) -> Recording {
        let reads = match self {
            Self::Chunks => &run.read_ahead,
            Self::Packed => &run.exact,
        };
        Recording { reads: reads.clone(), frames: workload.frames.clone() }
    }

    /// The image with what a profile made of `recording` adds to it.
    fn image(self, bare: &SimulatedImage, recording: &Recording) -> SimulatedImage {
        match self {
            Self::Chunks => bare.clone(),
            Self::Packed => bare.with_hot_blob(&recording.frames, &recording.blocks()),
        }
    }
}

/// One simulated start.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Of which workload.
    pub workload: String,
    /// Letter of the replayed run. The trace followed is always that of the first run.
    pub run: String,
    /// Name of the link.
    pub link: &'static str,
    /// Name of the layout.
    pub layout: &'static str,
    /// Name of the policy.
    pub policy: &'static str,
    /// `known` or `cold`; only our policy estimates anything.
    pub estimator: &'static str,
    /// T*.
    pub bound: Duration,
    /// A round trip of the link.
    pub round_trip: Duration,
    /// What came of it.
    pub outcome: Outcome,
}

impl Row {
    /// Time to ready over T*.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.outcome.ready.as_secs_f64() / self.bound.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Whether the start is as near to the bound as our policy promises: 1.06 times, or, when it must find out what
    /// the link is, three round trips if that is more.
    #[must_use]
    pub fn keeps_promise(&self) -> bool {
        let late = self.outcome.ready.saturating_sub(self.bound);
        self.ratio() <= 1.06 || (self.estimator == "cold" && late <= 3 * self.round_trip)
    }

    /// As written to the file.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "workload": self.workload, "run": self.run, "link": self.link, "layout": self.layout,
            "policy": self.policy, "estimator": self.estimator,
            "ready_seconds": self.outcome.ready.as_secs_f64(), "bound_seconds": self.bound.as_secs_f64(),
            "ratio": self.ratio(), "requests": self.outcome.requests, "bytes": self.outcome.bytes,
            "duplicate_bytes": self.outcome.duplicate_bytes, "misses": self.outcome.misses,
        })
    }
}

/// The image of a workload, without a profile.
#[must_use]
pub fn bare_image(workload: &Workload) -> SimulatedImage {
    SimulatedImage::new(workload.image_bytes, &workload.chunks)
}

/// Every policy on one run, over every link, in one layout.
///
/// # Errors
/// If a policy does not do its work.
pub fn rows(workload: &Workload, run: &Run, layout: Layout) -> Result<Vec<Row>> {
    let first = workload.runs.first().context("no runs")?;
    let recording = layout.recording(workload, first);
    let image = layout.image(&bare_image(workload), &recording);
    let plan = Plan::of(&Program::new(&image, &recording.reads, workload.warm), image.plan_cap_bytes());
    let program = Program::new(&image, &layout.recording(workload, run).reads, workload.warm);
    let mut rows = Vec::new();
    for named in LINKS {
        let estimate = Some(known(named.link));
        let policies: [(&str, &str, Box<dyn Policy>); 4] = [
            ("demand-only", "known", Box::new(DemandOnly::default())),
            ("fifo-16", "known", Box::new(Fifo::new(FIFO_CONNECTIONS, &plan.units()))),
            ("ublkimg", "known", Box::new(Ours::new(&image, Some(plan.clone()), estimate))),
            ("ublkimg", "cold", Box::new(Ours::new(&image, Some(plan.clone()), None))),
        ];
        let bound = program.bound(&image, named.link, Duration::ZERO).ready;
        for (policy, estimator, mut implementation) in policies {
            let outcome = replay(&image, &program, named, &mut *implementation)
                .with_context(|| format!("{} {} {} {policy}", workload.name, named.name, layout.name()))?;
            rows.push(Row {
                workload: workload.name.clone(),
                run: run.name.clone(),
                link: named.name,
                layout: layout.name(),
                policy,
                estimator,
                bound,
                round_trip: named.link.round_trip,
                outcome,
            });
        }
    }
    Ok(rows)
}

/// One start with a trace that does not fit, beside the same start without any.
#[derive(Debug, Clone, PartialEq)]
pub struct WrongRow {
    /// The start with the wrong trace.
    pub row: Row,
    /// What is wrong with it.
    pub trace: &'static str,
    /// The start without a trace.
    pub no_trace: Outcome,
    /// Most bytes that the plan may cost.
    pub cap_bytes: u64,
    /// Bytes that the plan did cost.
    pub plan_bytes: u64,
}

impl WrongRow {
    /// Time to ready over that without a trace.
    #[must_use]
    pub fn against_no_trace(&self) -> f64 {
        self.row.outcome.ready.as_secs_f64() / self.no_trace.ready.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Never more than a tenth worse than without a trace, and within the cap.
    #[must_use]
    pub fn keeps_promise(&self) -> bool {
        let wasted_bytes = self.row.outcome.wasted_bytes.saturating_sub(self.no_trace.wasted_bytes);
        self.against_no_trace() <= 1.10 && self.plan_bytes <= self.cap_bytes && wasted_bytes <= self.cap_bytes
    }

    /// As written to the file.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut json = self.row.json();
        let more = json!({
            "trace": self.trace, "no_trace_seconds": self.no_trace.ready.as_secs_f64(),
            "against_no_trace": self.against_no_trace(), "wasted_bytes": self.row.outcome.wasted_bytes,
            "no_trace_wasted_bytes": self.no_trace.wasted_bytes, "plan_bytes": self.plan_bytes,
            "cap_bytes": self.cap_bytes,
        });
        if let (Value::Object(json), Value::Object(more)) = (&mut json, more) {
            json.extend(more);
        }
        json
    }
}

/// One run with traces that do not fit: half of the right one, its reverse, random blocks, and that of another workload.
///
/// # Errors
/// If a policy does not do its work.
pub fn wrong_rows(workload: &Workload, other: &Workload, run: &Run, layout: Layout) -> Result<Vec<WrongRow>> {
    let first = workload.runs.first().context("no runs")?;
    let bare = bare_image(workload);
    let right = layout.recording(workload, first);
    let image_blocks = u32::try_from(workload.image_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
    let traces = [
        ("half", right.cut()),
        ("reversed", right.reversed()),
        ("random", right.random(image_blocks, SEED)),
        ("other", layout.recording(other, other.runs.first().context("no runs")?)),
    ];
    let reads = layout.recording(workload, run).reads;
    let best_image = layout.image(&bare, &right);
    let best = Program::new(&best_image, &reads, workload.warm);
    let without = Program::new(&bare, &reads, workload.warm);
    let mut rows = Vec::new();
    for named in LINKS {
        for estimate in [Some(known(named.link)), None] {
            let no_trace = replay(&bare, &without, named, &mut Ours::new(&bare, None, estimate))?;
            for (trace, recording) in &traces {
                let image = layout.image(&bare, recording);
                let program = Program::new(&image, &reads, workload.warm);
                let plan = Plan::of(&Program::new(&image, &recording.reads, workload.warm), image.plan_cap_bytes());
                let cap_bytes = plan.byte_cap;
                let mut ours = Ours::new(&image, Some(plan), estimate);
                let outcome = replay(&image, &program, named, &mut ours)?;
                let row = Row {
                    workload: workload.name.clone(),
                    run: run.name.clone(),
                    link: named.name,
                    layout: layout.name(),
                    policy: "ublkimg",
                    estimator: if estimate.is_some() { "known" } else { "cold" },
                    bound: best.bound(&best_image, named.link, Duration::ZERO).ready,
                    round_trip: named.link.round_trip,
                    outcome,
                };
                rows.push(WrongRow { row, trace, no_trace, cap_bytes, plan_bytes: ours.counters().plan_bytes });
            }
        }
    }
    Ok(rows)
}

fn replay(image: &SimulatedImage, program: &Program, named: NamedLink, policy: &mut dyn Policy) -> Result<Outcome> {
    Ok(simulate(&Scenario { image, program, link: named.link, lead: Duration::ZERO }, policy)?)
}

/// What a scheduler knows of a link that it used before.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn known(link: Link) -> Estimate {
    Estimate { bandwidth_bytes_per_second: link.bandwidth_bytes_per_s as u64, round_trip: link.round_trip }
}
