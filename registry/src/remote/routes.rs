//! Where the blobs of a registry really lie, learnt from its redirects.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use url::Url;

use crate::digest::Digest;

/// Blobs whose address is remembered: several times the layers that an image may have (registries document 127 and less),
/// at some 1.5 KB for a signed address.
const MAX_ROUTES: usize = 512;

/// The storage address of each blob that the registry redirected to another host. Good until the storage refuses it; then
/// the registry is asked again. The addresses are signed, so they are shown to nobody.
#[derive(Default)]
pub(super) struct Routes(Mutex<HashMap<Digest, Url>>);

impl Routes {
    pub(super) fn get(&self, digest: &Digest) -> Option<Url> {
        self.lock().get(digest).cloned()
    }

    pub(super) fn set(&self, digest: Digest, url: Url) {
        let mut routes = self.lock();
        if routes.len() >= MAX_ROUTES && !routes.contains_key(&digest) {
            let any = routes.keys().next().copied();
            any.and_then(|any| routes.remove(&any));
        }
        routes.insert(digest, url);
    }

    /// Forgets `url`, unless a newer one has taken its place.
    pub(super) fn forget(&self, digest: &Digest, url: &Url) {
        let mut routes = self.lock();
        if routes.get(digest) == Some(url) {
            routes.remove(digest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Url>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Routes({})", self.lock().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_and_forgetful() {
        let routes = Routes::default();
        let url = |path: &str| Url::parse("https://s.io/").unwrap().join(path).unwrap();
        for number in 0..2 * MAX_ROUTES {
            routes.set(Digest::of(&number.to_le_bytes()), url("x"));
        }
        assert_eq!(routes.lock().len(), MAX_ROUTES);
        let blob = Digest::of(b"blob");
        routes.set(blob, url("new"));
        routes.forget(&blob, &url("old"));
        assert_eq!(routes.get(&blob), Some(url("new")));
        routes.forget(&blob, &url("new"));
        assert_eq!(routes.get(&blob), None);
        routes.set(blob, url("?signature=SECRET"));
        assert!(!format!("{routes:?}").contains("SECRET"));
    }
}
