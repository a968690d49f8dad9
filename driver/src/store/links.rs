//! What is believed of the links to registries, so that the next process does not find it out again. It decides how much
//! is in flight and nothing else: a file that is not what it should be is taken for absent.

use std::io::Read as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ublkimg_scheduler::Estimate;

use super::Store;
use super::layout::replace_file;
use super::objects::open_if_there;
use crate::error::{Error, ErrorKind, Result};

/// The longest file: some hundred names of some hundred bytes.
const LINKS_BYTES_MAX: u64 = 1 << 20;

/// One link as it is written.
#[derive(Debug, Serialize, Deserialize)]
struct Link {
    name: String,
    bandwidth_bytes_per_second: u64,
    round_trip_us: u64,
}

impl Store {
    /// Keeps the estimates of links, by their names, in place of those before.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn put_links(&self, links: &[(String, Estimate)]) -> Result<()> {
        let link = |(name, estimate): &(String, Estimate)| Link {
            name: name.clone(),
            bandwidth_bytes_per_second: estimate.bandwidth_bytes_per_second,
            round_trip_us: u64::try_from(estimate.round_trip.as_micros()).unwrap_or(u64::MAX),
        };
        let links: Vec<Link> = links.iter().map(link).collect();
        let bytes = serde_json::to_vec_pretty(&links);
        let bytes = bytes.map_err(|error| Error::caused(ErrorKind::Internal, "write links as JSON", error))?;
        replace_file(&self.layout.links(), false, &[&bytes])
    }

    /// The estimates that were kept last.
    ///
    /// # Errors
    /// `Io`.
    pub fn links(&self) -> Result<Vec<(String, Estimate)>> {
        let path = self.layout.links();
        let Some(file) = open_if_there(&path)? else { return Ok(Vec::new()) };
        let mut bytes = Vec::new();
        file.take(LINKS_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| Error::path("read", &path, error))?;
        let links: Vec<Link> = serde_json::from_slice(&bytes).unwrap_or_default();
        let estimate = |link: Link| {
            let round_trip = Duration::from_micros(link.round_trip_us);
            let bandwidth_bytes_per_second = link.bandwidth_bytes_per_second;
            (link.name, Estimate { bandwidth_bytes_per_second, round_trip })
        };
        Ok(links.into_iter().map(estimate).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_kept_and_a_damaged_file_is_none() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        assert_eq!(store.links().unwrap(), []);
        let estimate = Estimate { bandwidth_bytes_per_second: 12_500_000, round_trip: Duration::from_millis(20) };
        let links = vec![("https://one".to_owned(), estimate)];
        store.put_links(&links).unwrap();
        assert_eq!(store.links().unwrap(), links);
        std::fs::write(root.path().join("links.json"), b"[{").unwrap();
        assert_eq!(store.links().unwrap(), []);
    }
}
