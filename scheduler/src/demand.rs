//! Demands: device requests that wait, and the chunks that they wait for.

use std::collections::BTreeMap;

use crate::flight::DEMAND_CHUNKS_TOTAL_MAX;
use crate::link::{DEMAND_CHUNKS_MAX, Queued};
use crate::scheduler::{EIO, Scheduler};
use crate::table::State;
use crate::types::{Action, BlobKey, ChunkKey, Class, ImageKey, Now, Ticket};

/// Who waits for what.
#[derive(Debug, Default)]
pub(crate) struct Demands {
    /// Who waits for a chunk that is queued or in flight. A ticket that was woken early may still be listed.
    pub(crate) waiters: BTreeMap<ChunkKey, Vec<Ticket>>,
    /// How many entries of `waiters` each waiting request still has.
    pub(crate) tickets: BTreeMap<Ticket, usize>,
}

impl Demands {
    /// A chunk needs no more waiting for.
    pub(crate) fn wake(&mut self, chunk: ChunkKey, actions: &mut Vec<Action>) {
        for ticket in self.waiters.remove(&chunk).unwrap_or_default() {
            // A request that was already woken with an error is no longer in the table.
            let Some(waits) = self.tickets.get_mut(&ticket) else { continue };
            *waits -= 1;
            if *waits == 0 {
                self.tickets.remove(&ticket);
                actions.push(Action::Wake { ticket, outcome: Ok(()) });
            }
        }
    }

    pub(crate) fn wake_with_error(&mut self, chunk: ChunkKey, errno: i32, actions: &mut Vec<Action>) {
        for ticket in self.waiters.remove(&chunk).unwrap_or_default() {
            if self.tickets.remove(&ticket).is_some() {
                actions.push(Action::Wake { ticket, outcome: Err(errno) });
            }
        }
    }

    pub(crate) fn wake_blob(&mut self, blob: BlobKey, errno: i32, actions: &mut Vec<Action>) {
        let of_blob = ChunkKey { blob, chunk: 0 }..=ChunkKey { blob, chunk: u32::MAX };
        let chunks: Vec<ChunkKey> = self.waiters.range(of_blob).map(|(chunk, _)| *chunk).collect();
        for chunk in chunks {
            self.wake_with_error(chunk, errno, actions);
        }
    }
}

impl Scheduler {
    pub(crate) fn demand(
        &mut self,
        image: ImageKey,
        ticket: Ticket,
        chunks: &[ChunkKey],
        now: Now,
        actions: &mut Vec<Action>,
    ) {
        self.counters.demands += 1;
        if let Some(image) = self.images.get_mut(&image) {
            image.counters.demands += 1;
        }
        if chunks.iter().any(|chunk| self.table.chunk(*chunk).is_none()) {
            actions.push(Action::Wake { ticket, outcome: Err(EIO) });
            return;
        }
        if let Some((_, errno)) = chunks.iter().find_map(|chunk| self.recent_failure(*chunk, now)) {
            actions.push(Action::Wake { ticket, outcome: Err(errno) });
            return;
        }
        let mut waits = 0;
        for &chunk in chunks {
            let is_absent = self.table.state(chunk) == Some(State::Absent);
            self.read(image, chunk, is_absent, now);
            if self.want(image, chunk, now) {
                self.demands.waiters.entry(chunk).or_default().push(ticket);
                waits += 1;
            }
        }
        if waits == 0 {
            actions.push(Action::Wake { ticket, outcome: Ok(()) });
        } else {
            self.demands.tickets.insert(ticket, waits);
        }
    }

    /// Makes sure that a demanded chunk is on its way; false if it is there already, or will never be.
    fn want(&mut self, image_key: ImageKey, chunk: ChunkKey, now: Now) -> bool {
        let mut nobody = Default::default();
        let of_image = self.images.get_mut(&image_key).map_or(&mut nobody, |image| &mut image.counters);
        match self.table.state(chunk) {
            None | Some(State::Present | State::Withdrawn) => return false,
            Some(State::Absent) => {
                self.counters.misses += 1;
                of_image.misses += 1;
                self.queue_demand(chunk, image_key, now);
            }
            Some(State::Queued) => {
                self.counters.joined += 1;
                of_image.joined += 1;
            }
            Some(State::InFlight) => match self.flights.chunks.get_mut(&chunk) {
                Some(flight) if flight.class != Class::Demand && flight.late_hit.is_none() => {
                    flight.late_hit = Some((image_key, now));
                    self.counters.late_hits += 1;
                    of_image.late_hits += 1;
                }
                _ => {
                    self.counters.joined += 1;
                    of_image.joined += 1;
                }
            },
        }
        true
    }

    pub(crate) fn queue_demand(&mut self, chunk: ChunkKey, image: ImageKey, since: Now) {
        let Some(link) = self.table.blob(chunk.blob).map(|blob| blob.link) else { return };
        self.table.set_state(chunk, State::Queued);
        self.links.entry(link).or_default().queue.push_back(Queued { chunk, image, since });
    }

    pub(crate) fn issue_demands(&mut self, now: Now, actions: &mut Vec<Action>) {
        let links: Vec<_> = self.links.iter().filter(|(_, link)| !link.queue.is_empty()).map(|(key, _)| *key).collect();
        for key in links {
            while self.flights.demand_chunks < DEMAND_CHUNKS_TOTAL_MAX
                && let Some(link) = self.links.get_mut(&key)
                && link.demands < DEMAND_CHUNKS_MAX
                && let Some(Queued { chunk, image, since }) = link.queue.pop_front()
            {
                self.issue(chunk, chunk.chunk + 1, Class::Demand, Some(image), since, now, actions);
            }
        }
    }
}
