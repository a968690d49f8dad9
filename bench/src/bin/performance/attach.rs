//! Attaching images of many layers and of many bytes, by digest and by tag, over a link with a round trip that counts.

use std::time::Instant;

use anyhow::{Result, ensure};
use ublkimg_bench::median;
use ublkimg_tests::registry::LinkConfig;

use crate::machine::Machine;
use crate::rows::{Bar, Row};

const RATE_MBIT_PER_S: u64 = 1000;
const ROUND_TRIP_MS: u64 = 20;
/// The bar of what is no round trip and no byte.
const OVERHEAD_MS: f64 = 100.0;

/// One attach.
struct Attach {
    took_ms: f64,
    bytes: f64,
    requests: f64,
    connections: f64,
}

pub(crate) fn measure(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (first, _) = machine.load("sample")?;
    let mut rows = Vec::new();
    let mut rest_ms: Vec<f64> = Vec::new();
    for (image, name) in [("layers", "50 layers"), ("large", "5 GB")] {
        let (by_tag, by_digest) = machine.load(image)?;
        for (way, reference, round_trips) in [("digest", by_digest, 2.0), ("tag", by_tag, 3.0)] {
            let mut attaches = Vec::new();
            for _ in 0..machine.rounds {
                attaches.push(one(machine, &first, &reference, options)?);
            }
            let column = |of: fn(&Attach) -> f64| attaches.iter().map(of).collect::<Vec<_>>();
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let (round_trip_ms, bytes_per_ms) = (ROUND_TRIP_MS as f64, RATE_MBIT_PER_S as f64 * 125.0);
            // A connection of its own costs one round trip more, which is included in neither.
            let rest = |attach: &Attach| {
                let waited = round_trips + attach.connections.min(1.0);
                attach.took_ms - waited * round_trip_ms - attach.bytes / bytes_per_ms
            };
            let rest: Vec<f64> = attaches.iter().map(rest).collect();
            if way == "digest" {
                rest_ms.push(median(&rest) + round_trips * round_trip_ms);
            }
            let what = format!("attach by {way}, {name}: ms beyond {round_trips} round trips and its bytes");
            rows.push(
                Row::of(what, rest, Bar::AtMost(OVERHEAD_MS))
                    .with("all", "ms", column(|attach| attach.took_ms))
                    .with("requests", "", column(|attach| attach.requests))
                    .with("bytes", "KB", column(|attach| attach.bytes / 1e3))
                    .with("new connections", "", column(|attach| attach.connections)),
            );
        }
    }
    ensure!(rest_ms.len() == 2, "two images");
    let (least, most) = (rest_ms[0].min(rest_ms[1]), rest_ms[0].max(rest_ms[1]));
    let what = "attach by digest: slower ÷ faster of the two images, without the time for bytes";
    rows.push(Row::of(what, vec![most / least], Bar::AtMost(1.2)));
    Ok(rows)
}

/// A host whose daemon runs and has talked to the registry, and which knows nothing of the image.
fn one(machine: &Machine, first: &str, reference: &str, options: &[&str]) -> Result<Attach> {
    machine.registry.set_link(LinkConfig::default());
    let host = machine.host("attach")?;
    host.add(first, "first", options)?;
    machine.registry.set_link(LinkConfig::new(RATE_MBIT_PER_S, ROUND_TRIP_MS / 2));
    machine.registry.reset_stats();
    let began = Instant::now();
    host.add(reference, "image", options)?;
    let took_ms = began.elapsed().as_secs_f64() * 1e3;
    let stats = machine.registry.stats();
    machine.registry.set_link(LinkConfig::default());
    let figure = |count: u64| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let requests = stats.requests.values().sum();
    Ok(Attach {
        took_ms,
        bytes: figure(stats.bytes_sent),
        requests: figure(requests),
        connections: figure(stats.connections),
    })
}
