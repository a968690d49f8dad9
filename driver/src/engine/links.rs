//! Names of links: one for each registry host, for the life of the engine, so that what is known of a path is found out
//! once.

use std::collections::BTreeMap;

use ublkimg_scheduler::{Estimate, LinkKey, Scheduler};

/// Links that are told apart. A host knows a few registries; further ones count as one.
pub(super) const LINKS_MAX: usize = 256;

/// The link of all that there is no room for.
const OTHERS: LinkKey = LinkKey(u32::MAX);

#[derive(Debug, Default)]
pub(super) struct Links(BTreeMap<String, LinkKey>);

impl Links {
    /// The key of a link, a new one for a new name.
    pub(super) fn key(&mut self, name: &str) -> LinkKey {
        if let Some(key) = self.0.get(name) {
            return *key;
        }
        if self.0.len() >= LINKS_MAX {
            return OTHERS;
        }
        let key = LinkKey(u32::try_from(self.0.len()).unwrap_or(u32::MAX));
        self.0.insert(name.to_owned(), key);
        key
    }

    /// What the scheduler believes of them.
    pub(super) fn estimates(&self, scheduler: &Scheduler) -> Vec<(String, Estimate)> {
        let estimate = |(name, key): (&String, &LinkKey)| Some((name.clone(), scheduler.estimate(*key)?));
        self.0.iter().filter_map(estimate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_key_and_their_number_is_bounded() {
        let mut links = Links::default();
        let first = links.key("https://one");
        assert_ne!(links.key("https://two"), first);
        assert_eq!(links.key("https://one"), first);
        for number in 0..2 * LINKS_MAX {
            links.key(&format!("https://{number}"));
        }
        assert_eq!(links.0.len(), LINKS_MAX);
        assert_eq!(links.key("https://more"), links.key("https://still more"));
    }
}
