//! Faults: named toxics in a layer around the registry, switched at run time.
//!
//! The registry itself knows nothing of them. Each [`Fault`] has a name, a path pattern and one [`Toxic`]; all that
//! match a request apply to it, in the order of their names. A guest sets them with `POST /_faults` and a JSON object
//! from name to fault (`null` takes one away), for example
//!
//! ```json
//! {"slow": {"path": "*/blobs/*", "toxic": {"latency": {"latency_ms": 1000}}},
//!  "busy": {"path": "*", "times": 3, "toxic": {"status": {"code": 503}}},
//!  "away": {"after_ms": 500, "for_ms": 2000, "toxic": "refuse"}}
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Toxic {
    /// The answer starts this much later.
    Latency {
        /// Time before the request is looked at.
        latency_ms: u64,
    },
    /// No answer while the fault is set; then an ordinary one.
    Hang,
    /// This status, and no more.
    Status {
        /// HTTP status code.
        code: u16,
    },
    /// 429 with a `Retry-After`.
    TooManyRequests {
        /// Value of `Retry-After`.
        retry_after_s: u64,
    },
    /// 503 with a `Retry-After`.
    Unavailable {
        /// Value of `Retry-After`.
        retry_after_s: u64,
    },
    /// The body comes no faster than this.
    Slow {
        /// Bytes per second of each answer.
        bytes_per_s: u64,
    },
    /// The connection closes in the middle of the body, which its Content-Length still promises whole.
    ShortBody {
        /// Body bytes that are sent.
        after_bytes: u64,
    },
    /// As `short_body`, but with a TCP reset.
    Reset {
        /// Body bytes that are sent.
        after_bytes: u64,
    },
    /// A ranged request is answered with 200 and the whole body.
    IgnoreRange,
    /// The Content-Range of a 206 names bytes one further on than those sent.
    WrongContentRange,
    /// The lowest bit of one byte is wrong.
    BitFlip {
        /// Offset in the blob (or manifest), whatever range of it is asked for.
        offset_bytes: u64,
    },
    /// What is there is said to be somewhere else: 307 to the same path below this address.
    Redirect {
        /// Address of a server, such as `http://127.0.0.1:80`; what follows a `?` comes behind the path.
        to: String,
    },
    /// The registry is down: open connections are reset, new ones refused. The path does not matter. A guest can bring
    /// it up again only with `for_ms`, as its control path is down too.
    Refuse,
}

/// A toxic, and where and how long it applies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Pattern of the whole path; `*` stands for any characters, `/` among them.
    #[serde(default = "any_path")]
    pub path: String,
    /// Only requests with this method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Only the next so many requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
    /// Only from so long after it is set, so that one call can set a sequence of faults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
    /// Only so long, from when it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
    /// What goes wrong.
    pub toxic: Toxic,
}

fn any_path() -> String {
    "*".into()
}

impl Fault {
    /// `toxic` for every request to a path that matches `path`.
    pub fn new(path: &str, toxic: Toxic) -> Self {
        Self { path: path.into(), method: None, times: None, after_ms: None, for_ms: None, toxic }
    }

    /// The same, for the next `times` requests only.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times: Some(times), ..self }
    }

    /// The same, for requests with `method` only.
    #[must_use]
    pub fn method(self, method: &str) -> Self {
        Self { method: Some(method.into()), ..self }
    }

    /// The same, from `after_ms` after it is set.
    #[must_use]
    pub fn after_ms(self, after_ms: u64) -> Self {
        Self { after_ms: Some(after_ms), ..self }
    }

    /// The same, for `for_ms` from when it begins.
    #[must_use]
    pub fn for_ms(self, for_ms: u64) -> Self {
        Self { for_ms: Some(for_ms), ..self }
    }
}

/// A fault that is set, and how often it was met.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ActiveFault {
    #[serde(flatten)]
    fault: Fault,
    hits: u64,
    #[serde(skip)]
    begins_at: Instant,
    #[serde(skip)]
    ends_at: Option<Instant>,
}

impl ActiveFault {
    fn is_over(&self) -> bool {
        self.ends_at.is_some_and(|at| Instant::now() >= at) || self.fault.times.is_some_and(|times| self.hits >= times)
    }

    fn has_begun(&self) -> bool {
        Instant::now() >= self.begins_at
    }

    fn refuses(&self) -> bool {
        self.fault.toxic == Toxic::Refuse && self.has_begun() && !self.is_over()
    }

    fn matches(&self, method: &str, path: &str) -> bool {
        self.has_begun()
            && !self.is_over()
            && self.fault.method.as_deref().is_none_or(|only| only.eq_ignore_ascii_case(method))
            && pattern_matches(self.fault.path.as_bytes(), path.as_bytes())
    }
}

/// Names of faults to what they become; `None` takes one away.
pub(crate) type FaultChanges = BTreeMap<String, Option<Fault>>;

/// The faults that are set. The few that a test sets: not bounded.
pub(crate) struct Faults {
    active: watch::Sender<BTreeMap<String, ActiveFault>>,
}

impl Faults {
    pub(crate) fn new() -> Self {
        Self { active: watch::Sender::new(BTreeMap::new()) }
    }

    pub(crate) fn change(&self, changes: FaultChanges) {
        self.active.send_modify(|active| {
            for (name, fault) in changes {
                active.remove(&name);
                if let Some(fault) = fault {
                    let begins_at = Instant::now() + Duration::from_millis(fault.after_ms.unwrap_or(0));
                    let ends_at = fault.for_ms.map(|ms| begins_at + Duration::from_millis(ms));
                    active.insert(name, ActiveFault { fault, hits: 0, begins_at, ends_at });
                }
            }
        });
    }

    pub(crate) fn clear(&self) {
        self.active.send_modify(BTreeMap::clear);
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<String, ActiveFault> {
        self.active.borrow().clone()
    }

    /// Requests that met the fault `name` since it was set.
    pub(crate) fn hits(&self, name: &str) -> u64 {
        self.active.borrow().get(name).map_or(0, |active| active.hits)
    }

    /// The toxics that this request meets, by name; counts them as met.
    pub(crate) fn meet(&self, method: &str, path: &str) -> Vec<(String, Toxic)> {
        let mut met = Vec::new();
        self.active.send_if_modified(|active| {
            for (name, fault) in active.iter_mut().filter(|(_, fault)| fault.matches(method, path)) {
                fault.hits += 1;
                met.push((name.clone(), fault.fault.toxic.clone()));
            }
            false
        });
        met
    }

    pub(crate) fn is_down(&self) -> bool {
        any_refuses(&self.active.borrow())
    }

    pub(crate) async fn until_down(&self) {
        let mut active = self.active.subscribe();
        loop {
            let begins_at = {
                let active = active.borrow_and_update();
                if any_refuses(&active) {
                    return;
                }
                next_refusal(&active)
            };
            // Nothing announces that a fault's time has come. An error means that the registry ends; so does the caller's
            // task.
            let changed = active.changed();
            match begins_at {
                Some(at) => drop(tokio::time::timeout_at(at.into(), changed).await),
                None if changed.await.is_err() => return,
                None => {}
            }
        }
    }

    pub(crate) async fn until_up(&self) {
        self.until(|active| !any_refuses(active)).await;
    }

    /// Completes when the fault `name` is taken away or over.
    pub(crate) async fn until_over(&self, name: &str) {
        self.until(|active| {
            active.get(name).is_none_or(|active| active.ends_at.is_some_and(|at| Instant::now() >= at))
        })
        .await;
    }

    async fn until(&self, mut over: impl FnMut(&BTreeMap<String, ActiveFault>) -> bool) {
        /// Nothing announces that a fault's time is over.
        const POLL: Duration = Duration::from_millis(5);
        let mut active = self.active.subscribe();
        while tokio::time::timeout(POLL, active.wait_for(&mut over)).await.is_err() {}
    }
}

fn any_refuses(active: &BTreeMap<String, ActiveFault>) -> bool {
    active.values().any(ActiveFault::refuses)
}

/// When the registry will go down by itself.
fn next_refusal(active: &BTreeMap<String, ActiveFault>) -> Option<Instant> {
    let to_come = active.values().filter(|active| active.fault.toxic == Toxic::Refuse && !active.has_begun());
    to_come.map(|active| active.begins_at).min()
}

/// Whether `pattern` with `*` for any characters matches all of `text`.
fn pattern_matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|start| pattern_matches(rest, &text[start..])),
        Some((byte, rest)) => {
            text.split_first().is_some_and(|(first, text)| first == byte && pattern_matches(rest, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let matches = |pattern: &str, text: &str| pattern_matches(pattern.as_bytes(), text.as_bytes());
        assert!(matches("*", "/v2/"));
        assert!(matches("*/blobs/*", "/v2/a/b/blobs/sha256:00"));
        assert!(!matches("*/blobs/*", "/v2/a/manifests/latest"));
        assert!(matches("/v2/", "/v2/"));
        assert!(!matches("/v2/", "/v2/a"));
    }

    #[test]
    fn faults_end_after_their_requests_or_their_time() {
        let faults = Faults::new();
        let twice = Fault::new("*", Toxic::Status { code: 503 }).times(2).method("get");
        let over = Fault::new("*", Toxic::Hang).for_ms(0);
        faults.change(BTreeMap::from([("twice".into(), Some(twice)), ("over".into(), Some(over))]));
        assert!(faults.meet("POST", "/v2/").is_empty());
        let met: Vec<usize> = (0..4).map(|_| faults.meet("GET", "/v2/").len()).collect();
        assert_eq!(met, [1, 1, 0, 0]);
        assert_eq!(faults.hits("twice"), 2);
        faults.clear();
        assert_eq!(faults.hits("twice"), 0);
    }

    #[tokio::test]
    async fn a_sequence_goes_by_itself() {
        let faults = Faults::new();
        let busy = Fault::new("*", Toxic::Status { code: 503 }).after_ms(100).for_ms(100);
        let away = Fault::new("*", Toxic::Refuse).after_ms(200).for_ms(100);
        let start = Instant::now();
        faults.change(BTreeMap::from([("busy".into(), Some(busy)), ("away".into(), Some(away))]));
        assert!(faults.meet("GET", "/").is_empty() && !faults.is_down());
        tokio::time::sleep(Duration::from_millis(120)).await;
        assert_eq!(faults.meet("GET", "/").is_empty(), start.elapsed() >= Duration::from_millis(200));
        faults.until_down().await;
        assert!(start.elapsed() >= Duration::from_millis(200));
        faults.until_up().await;
        assert!(start.elapsed() >= Duration::from_millis(300));
    }

    #[test]
    fn json_of_the_module_head() {
        let json = r#"{"slow": {"path": "*/blobs/*", "toxic": {"latency": {"latency_ms": 1000}}},
            "busy": {"path": "*", "times": 3, "toxic": {"status": {"code": 503}}},
            "away": {"after_ms": 500, "for_ms": 2000, "toxic": "refuse"}, "gone": null}"#;
        let changes: FaultChanges = serde_json::from_str(json).unwrap();
        assert_eq!(changes["away"], Some(Fault::new("*", Toxic::Refuse).after_ms(500).for_ms(2000)));
        assert_eq!(changes["gone"], None);
    }
}
