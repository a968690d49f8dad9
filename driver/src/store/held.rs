//! Objects that this process is about to need, or whose image it serves.
//!
//! What an image in use needs follows from its device's record; but an attach reads its objects before there is a record,
//! and whoever makes room may have read the records before that one was written. So an attach holds each object *before*
//! it looks for it, for as long as the image is there, and an object is removed under the same lock under which it is
//! looked whether somebody holds it. An image that is served can so always be taken back by the next server.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use ublkimg_image::Sha256;

/// How often each object is held. As many as images in use have objects: a handful each.
type Holds = Mutex<BTreeMap<Sha256, usize>>;

/// The objects that are held.
#[derive(Debug, Default)]
pub(super) struct HeldObjects(Arc<Holds>);

/// An object that stays in the store, if it is there or comes to be, until this is dropped.
#[derive(Debug)]
pub(crate) struct HeldObject {
    digest: Sha256,
    holds: Arc<Holds>,
}

impl HeldObjects {
    pub(super) fn hold(&self, digest: Sha256) -> HeldObject {
        *self.0.lock().entry(digest).or_default() += 1;
        HeldObject { digest, holds: Arc::clone(&self.0) }
    }

    /// Does that unless somebody holds the object. Nobody begins to meanwhile: who holds waits for one removal of a file, so not on
    /// a thread that must not wait.
    pub(super) fn unless_held<T>(&self, digest: Sha256, remove: impl FnOnce() -> T) -> Option<T> {
        let holds = self.0.lock();
        (!holds.contains_key(&digest)).then(remove)
    }
}

impl Drop for HeldObject {
    fn drop(&mut self) {
        let mut holds = self.holds.lock();
        if let Some(count) = holds.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                holds.remove(&self.digest);
            }
        }
    }
}
