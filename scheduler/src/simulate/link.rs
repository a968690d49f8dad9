//! The fluid link.

use std::collections::VecDeque;
use std::time::Duration;

use crate::types::{ChunkKey, Now};

/// A link: a rate and a round trip.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Of all transfers together; more than 0.
    pub bandwidth_bytes_per_s: f64,
    /// From a request until the first byte of its answer.
    pub round_trip: Duration,
}

/// What the link did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The answer to a fetch has begun.
    FirstByte { fetch: u64 },
    /// All bytes of a unit are here.
    Unit { fetch: u64, unit: ChunkKey },
}

/// One answer: its units come one after another.
#[derive(Debug)]
struct Transfer {
    fetch: u64,
    /// When its first byte comes.
    begins: Now,
    begun: bool,
    /// Units still to come, each with the value of [`FluidLink::served_bytes`] at which it is complete: until the
    /// transfer begins, counted from there.
    units: VecDeque<(ChunkKey, f64)>,
}

/// Transfers that share a link equally.
///
/// All active transfers get the same number of bytes in the same time, so one counter serves all of them: what a
/// transfer that was active since the counter's zero would have got.
#[derive(Debug)]
pub(super) struct FluidLink {
    link: Link,
    now: Now,
    served_bytes: f64,
    /// In the order of their requests.
    transfers: Vec<Transfer>,
}

/// Of rounding, far below a byte, and above the error of adding up gigabytes.
const ROUNDING_BYTES: f64 = 1e-4;

impl FluidLink {
    pub(super) fn new(link: Link) -> Self {
        Self { link, now: Now::ZERO, served_bytes: 0.0, transfers: Vec::new() }
    }

    /// Asks for units that lie one after another.
    pub(super) fn request(&mut self, fetch: u64, units: impl Iterator<Item = (ChunkKey, u32)>) {
        let mut end_bytes = 0.0;
        let units = units.map(|(unit, stored_len_bytes)| {
            end_bytes += f64::from(stored_len_bytes);
            (unit, end_bytes)
        });
        let begins = self.now + self.link.round_trip;
        self.transfers.push(Transfer { fetch, begins, begun: false, units: units.collect() });
    }

    /// Whether anything is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.transfers.is_empty()
    }

    /// When the next delivery happens if nothing else is asked for until then.
    pub(super) fn next_at(&self) -> Option<Now> {
        let begins = self.transfers.iter().filter(|transfer| !transfer.begun).map(|transfer| transfer.begins).min();
        let end_bytes = self.ends().min_by(f64::total_cmp);
        let ends = end_bytes.map(|end_bytes| {
            let lacking_bytes = end_bytes - self.served_bytes;
            if lacking_bytes <= ROUNDING_BYTES {
                return self.now;
            }
            let wait = Duration::try_from_secs_f64(lacking_bytes / self.share_bytes_per_s());
            // Rounded up, so that the unit is complete then.
            self.now.saturating_add(wait.unwrap_or(Duration::MAX)).saturating_add(Duration::from_nanos(1))
        });
        begins.into_iter().chain(ends).min()
    }

    /// Lets time pass, not beyond [`Self::next_at`].
    pub(super) fn advance(&mut self, now: Now) {
        let passed_s = now.saturating_sub(self.now).as_secs_f64();
        if self.ends().next().is_some() {
            self.served_bytes += passed_s * self.share_bytes_per_s();
        } else {
            self.served_bytes = 0.0;
        }
        self.now = self.now.max(now);
    }

    /// What happens at this moment, one after another.
    pub(super) fn pop(&mut self) -> Option<Delivery> {
        let served_bytes = self.served_bytes;
        if let Some(transfer) =
            self.transfers.iter_mut().find(|transfer| !transfer.begun && transfer.begins <= self.now)
        {
            transfer.begun = true;
            for (_, end_bytes) in &mut transfer.units {
                *end_bytes += served_bytes;
            }
            return Some(Delivery::FirstByte { fetch: transfer.fetch });
        }
        let complete = |transfer: &Transfer| {
            let first = transfer.units.front();
            transfer.begun && first.is_none_or(|(_, end_bytes)| *end_bytes <= served_bytes + ROUNDING_BYTES)
        };
        let index = self.transfers.iter().position(complete)?;
        let transfer = self.transfers.get_mut(index)?;
        let (fetch, unit) = (transfer.fetch, transfer.units.pop_front());
        if transfer.units.is_empty() {
            self.transfers.remove(index);
        }
        unit.map(|(unit, _)| Delivery::Unit { fetch, unit })
    }

    fn ends(&self) -> impl Iterator<Item = f64> {
        let begun = self.transfers.iter().filter(|transfer| transfer.begun);
        begun.filter_map(|transfer| transfer.units.front()).map(|(_, end_bytes)| *end_bytes)
    }

    #[allow(clippy::cast_precision_loss)]
    fn share_bytes_per_s(&self) -> f64 {
        self.link.bandwidth_bytes_per_s / self.ends().count().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlobKey;

    fn unit(chunk: u32) -> ChunkKey {
        ChunkKey { blob: BlobKey(0), chunk }
    }

    /// 1000 bytes per millisecond, 20 ms.
    fn link() -> FluidLink {
        FluidLink::new(Link { bandwidth_bytes_per_s: 1e6, round_trip: Duration::from_millis(20) })
    }

    /// Everything that is delivered, with the milliseconds.
    fn drain(link: &mut FluidLink) -> Vec<(u64, Option<u32>)> {
        let mut deliveries = Vec::new();
        while let Some(at) = link.next_at() {
            link.advance(at);
            while let Some(delivery) = link.pop() {
                let at_ms = u64::try_from(at.as_millis()).expect("short");
                deliveries.push(match delivery {
                    Delivery::FirstByte { .. } => (at_ms, None),
                    Delivery::Unit { unit, .. } => (at_ms, Some(unit.chunk)),
                });
            }
        }
        assert!(link.is_idle());
        deliveries
    }

    #[test]
    fn a_transfer_alone_has_the_whole_rate_and_delivers_in_order() {
        let mut link = link();
        link.request(1, [(unit(5), 10_000), (unit(6), 5_000)].into_iter());
        assert_eq!(drain(&mut link), [(20, None), (30, Some(5)), (35, Some(6))]);
    }

    #[test]
    fn transfers_share_equally() {
        let mut link = link();
        link.request(1, [(unit(1), 10_000)].into_iter());
        link.request(2, [(unit(2), 20_000)].into_iter());
        assert_eq!(drain(&mut link), [(20, None), (20, None), (40, Some(1)), (50, Some(2))]);
    }

    #[test]
    fn a_later_transfer_slows_the_first_from_its_first_byte_on() {
        let mut link = link();
        link.request(1, [(unit(1), 10_000)].into_iter());
        link.advance(Duration::from_millis(5));
        link.request(2, [(unit(2), 10_000)].into_iter());
        // 5 ms alone, then 10 ms shared, then the last 5 kB alone.
        assert_eq!(drain(&mut link), [(20, None), (25, None), (35, Some(1)), (40, Some(2))]);
    }

    #[test]
    fn an_answer_without_bytes_ends_at_once() {
        let mut link = link();
        link.request(1, std::iter::empty());
        assert_eq!(drain(&mut link), [(20, None)]);
    }
}
