//! Deficit round robin: images share a link by bytes, whatever the size of their chunks.

use crate::types::ImageKey;

/// Bytes that an image may ask for when its turn comes: one chunk of the largest size.
pub(crate) const QUANTUM_BYTES: u64 = 256 << 10;

/// The ring of images that have something to ask for on one link.
#[derive(Debug, Default)]
pub(crate) struct Fair {
    ring: Vec<(ImageKey, u64)>,
    turn: usize,
    /// The image whose turn it is has had its quantum.
    granted: bool,
}

impl Fair {
    pub(crate) fn add(&mut self, image: ImageKey) {
        if !self.ring.iter().any(|(other, _)| *other == image) {
            self.ring.push((image, 0));
        }
    }

    pub(crate) fn remove(&mut self, image: ImageKey) {
        let Some(at) = self.ring.iter().position(|(other, _)| *other == image) else { return };
        self.ring.remove(at);
        if at == self.turn {
            self.granted = false;
        } else if at < self.turn {
            self.turn -= 1;
        }
        if self.turn >= self.ring.len() {
            self.turn = 0;
        }
    }

    pub(crate) fn images(&self) -> impl Iterator<Item = ImageKey> {
        self.ring.iter().map(|(image, _)| *image)
    }

    pub(crate) fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whose turn it is, and the bytes that it may ask for before it passes the turn on: all it likes if it is alone.
    pub(crate) fn turn(&mut self) -> Option<(ImageKey, u64)> {
        let alone = self.ring.len() == 1;
        let (image, deficit) = self.ring.get_mut(self.turn)?;
        if !self.granted {
            *deficit += QUANTUM_BYTES;
            self.granted = true;
        }
        Some((*image, if alone { u64::MAX } else { *deficit }))
    }

    pub(crate) fn spend(&mut self, bytes: u64) {
        if let Some((_, deficit)) = self.ring.get_mut(self.turn) {
            *deficit = deficit.saturating_sub(bytes);
        }
    }

    /// The image wants more than it may: what it has left counts when its turn comes again.
    pub(crate) fn pass(&mut self) {
        self.turn = (self.turn + 1) % self.ring.len().max(1);
        self.granted = false;
    }

    /// The image has nothing to ask for: what it has left is lost.
    pub(crate) fn rest(&mut self) {
        if let Some((_, deficit)) = self.ring.get_mut(self.turn) {
            *deficit = 0;
        }
        self.pass();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_share_by_bytes_also_when_there_is_room_for_one_chunk_at_a_time() {
        let mut fair = Fair::default();
        fair.add(ImageKey(0));
        fair.add(ImageKey(1));
        fair.add(ImageKey(1));
        assert_eq!(fair.len(), 2);
        let mut spent = [0, 0];
        while spent[0] + spent[1] < 100 << 20 {
            let (image, left) = fair.turn().unwrap();
            let image = image.0 as usize;
            let len = [200 << 10, 8 << 10][image];
            if left >= len {
                fair.spend(len);
                spent[image] += len;
            } else {
                fair.pass();
            }
        }
        assert!(spent[0].abs_diff(spent[1]) < 1 << 20, "{spent:?}");
    }

    #[test]
    fn who_rests_saves_nothing_up() {
        let mut fair = Fair::default();
        fair.add(ImageKey(0));
        fair.add(ImageKey(1));
        for _ in 0..10 {
            assert_eq!(fair.turn().unwrap().1, QUANTUM_BYTES);
            fair.rest();
        }
    }

    #[test]
    fn who_is_alone_takes_all() {
        let mut fair = Fair::default();
        fair.add(ImageKey(0));
        fair.add(ImageKey(1));
        fair.pass();
        fair.remove(ImageKey(0));
        assert_eq!(fair.turn(), Some((ImageKey(1), u64::MAX)));
        fair.remove(ImageKey(1));
        assert_eq!(fair.turn(), None);
    }
}
