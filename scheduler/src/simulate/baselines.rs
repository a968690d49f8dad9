//! What the policy is compared with.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::types::{ChunkKey, Now};

use super::run::{Happened, Order, Policy};

/// Fetches what a read waits for and nothing else: lazy loading without prefetch.
#[derive(Debug, Default)]
pub struct DemandOnly {
    desk: Desk,
}

/// Fetches a trace in its order, one unit to a request, a fixed number of requests at a time; a demand goes beside them
/// and shares the link equally. What others do: overlaybd replays its traces with 16 workers.
#[derive(Debug)]
pub struct Fifo {
    desk: Desk,
    order: VecDeque<ChunkKey>,
    connections: usize,
    /// Of the trace, not of demands.
    under_way: BTreeSet<ChunkKey>,
}

impl Fifo {
    /// Replays `order` with that many requests at a time.
    #[must_use]
    pub fn new(connections: usize, order: &[ChunkKey]) -> Self {
        let order = order.iter().copied().collect();
        Self { desk: Desk::default(), order, connections, under_way: BTreeSet::new() }
    }

    fn issue(&mut self, orders: &mut Vec<Order>) {
        while self.under_way.len() < self.connections
            && let Some(unit) = self.order.pop_front()
        {
            if self.desk.fetch(unit, orders) {
                self.under_way.insert(unit);
            }
        }
    }
}

impl Policy for DemandOnly {
    fn on(&mut self, happened: Happened<'_>, _: Now, orders: &mut Vec<Order>) {
        self.desk.on(happened, orders);
    }
}

impl Policy for Fifo {
    fn on(&mut self, happened: Happened<'_>, _: Now, orders: &mut Vec<Order>) {
        if let Happened::Arrived { unit } = happened {
            self.under_way.remove(&unit);
        }
        self.desk.on(happened, orders);
        self.issue(orders);
    }
}

/// What both share: who asked for what, and the read that waits.
#[derive(Debug, Default)]
struct Desk {
    asked: BTreeSet<ChunkKey>,
    there: BTreeSet<ChunkKey>,
    /// Reads that wait, with what each still lacks.
    waiting: BTreeMap<u64, BTreeSet<ChunkKey>>,
    fetches: u64,
}

impl Desk {
    fn on(&mut self, happened: Happened<'_>, orders: &mut Vec<Order>) {
        match happened {
            Happened::Demand { ticket, units } => {
                self.waiting.insert(ticket, units.iter().copied().collect());
                for &unit in units {
                    self.fetch(unit, orders);
                }
            }
            Happened::Arrived { unit } => {
                self.there.insert(unit);
                self.waiting.retain(|ticket, lacks| {
                    lacks.remove(&unit);
                    if lacks.is_empty() {
                        orders.push(Order::Wake { ticket: *ticket });
                    }
                    !lacks.is_empty()
                });
            }
            Happened::Began
            | Happened::Touch { .. }
            | Happened::Avoided { .. }
            | Happened::FirstByte { .. }
            | Happened::Tick => {}
        }
    }

    /// Asks for a unit unless that was done before.
    fn fetch(&mut self, unit: ChunkKey, orders: &mut Vec<Order>) -> bool {
        let new = self.asked.insert(unit);
        if new {
            self.fetches += 1;
            orders.push(Order::Fetch { fetch: self.fetches, blob: unit.blob, units: unit.chunk..unit.chunk + 1 });
        }
        new
    }
}
