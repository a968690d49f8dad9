//! A registry in trouble in the middle of a prefetch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ublkimg_tests::registry::{Fault, LinkConfig, TestRegistry, Toxic};

/// How long the registry is away.
pub(crate) const CUT: Duration = Duration::from_secs(5);
const SLOW: Duration = Duration::from_millis(500);
/// How long it asks for patience, one second each time.
const BUSY: Duration = Duration::from_millis(1500);
const BUSY_NAME: &str = "busy";
const CUT_NAME: &str = "cut";

/// What the start met.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Met {
    /// Body bytes that the registry had sent when it got slow; when it asked for patience; when it went away.
    pub(crate) at_bytes: [u64; 3],
    /// Requests answered with 429.
    pub(crate) too_many: u64,
}

/// The trouble under way: it begins when a part of `expected_bytes` has been sent.
pub(crate) struct Trouble {
    thread: JoinHandle<Met>,
    is_over: Arc<AtomicBool>,
}

impl Trouble {
    pub(crate) fn begin(registry: &Arc<TestRegistry>, link: (u64, u64), expected_bytes: u64) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (registry, is_over) = (Arc::clone(registry), Arc::clone(&is_over));
            move || make(&registry, link, expected_bytes, &is_over)
        });
        Self { thread, is_over }
    }

    /// After the start: what it met. `None` if the thread failed.
    pub(crate) fn end(self) -> Option<Met> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().ok()
    }
}

fn make(registry: &TestRegistry, (rate_mbit, delay_ms): (u64, u64), expected_bytes: u64, is_over: &AtomicBool) -> Met {
    let wait_for = |percent: u64| {
        while registry.stats().bytes_sent < expected_bytes * percent / 100 && !is_over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(2));
        }
        registry.stats().bytes_sent
    };
    let slow_at = wait_for(20);
    registry.set_link(LinkConfig::new((rate_mbit / 10).max(1), delay_ms));
    std::thread::sleep(SLOW);
    registry.set_link(LinkConfig::new(rate_mbit, delay_ms));
    let busy_at = wait_for(40);
    let busy = Fault::new("/v2/*", Toxic::TooManyRequests { retry_after_s: 1 });
    registry.set_fault(BUSY_NAME, busy);
    std::thread::sleep(BUSY);
    let too_many = registry.fault_hits(BUSY_NAME);
    registry.clear_fault(BUSY_NAME);
    let cut_at = wait_for(60);
    registry.set_fault(CUT_NAME, Fault::new("*", Toxic::Refuse));
    std::thread::sleep(CUT);
    registry.clear_faults();
    Met { at_bytes: [slow_at, busy_at, cut_at], too_many }
}
