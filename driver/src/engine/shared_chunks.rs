//! A chunk that several blobs have comes over the network once: the others get it from the blob that has it, or wait
//! until it does.

use std::collections::HashMap;
use std::sync::Arc;

use ublkimg_image::{Chunk, Sha256};
use ublkimg_scheduler::{ChunkKey, LinkKey};

use crate::fetch::Order;
use crate::store::{BlobFile, ChunkPlace, ChunkPlaces};

/// How a chunk is to be had.
pub(super) enum Way {
    /// From its registry.
    Fetch,
    /// From another blob.
    Copy(Order, ChunkPlace),
    /// It is being fetched for another blob: the order comes back when that is over.
    Wait,
}

/// The chunks that are here and those that are coming, by name.
pub(super) struct SharedChunks {
    here: Arc<ChunkPlaces>,
    /// Who fetches a name. As many as the scheduler has in flight.
    coming: HashMap<Sha256, ChunkKey>,
    fetches: HashMap<ChunkKey, Fetch>,
}

/// One fetch.
struct Fetch {
    name: Sha256,
    /// Who waits for another registry might wait long.
    link: LinkKey,
    /// What it is to be copied for: each a chunk in flight as well.
    waiting: Vec<Order>,
}

impl SharedChunks {
    pub(super) fn new(here: Arc<ChunkPlaces>) -> Self {
        Self { here, coming: HashMap::new(), fetches: HashMap::new() }
    }

    /// How a chunk is to be had that belongs into `file`; `order` is for it alone.
    pub(super) fn way(&mut self, chunk: &Chunk, file: &BlobFile, link: LinkKey, order: Order) -> Way {
        let name = chunk.id.0;
        if let Some(place) = self.here.find(name) {
            if !place.is(file, chunk.raw.start) {
                return Way::Copy(order, place);
            }
            // Where it belongs it is missing: it was evicted.
            self.here.forget(name);
        }
        let key = ChunkKey { blob: order.blob, chunk: order.chunks.start };
        match self.coming.get(&name).and_then(|fetch| self.fetches.get_mut(fetch)) {
            Some(fetch) if fetch.link == link => {
                fetch.waiting.push(order);
                return Way::Wait;
            }
            Some(_) => {}
            None => {
                self.coming.insert(name, key);
                self.fetches.insert(key, Fetch { name, link, waiting: Vec::new() });
            }
        }
        Way::Fetch
    }

    /// A fetch is over, however it ended: these orders are to be looked at again.
    pub(super) fn over(&mut self, key: ChunkKey) -> Vec<Order> {
        let Some(fetch) = self.fetches.remove(&key) else { return Vec::new() };
        self.coming.remove(&fetch.name);
        fetch.waiting
    }
}
