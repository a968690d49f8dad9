//! Whose turn the link is while an image is attached.
//!
//! The program cannot run before the metadata is here, and then wants the hot blob from its first frame on. Side by side
//! they would each have half of the link, so the device would come later and the last frame no sooner. Only the first
//! frames are therefore asked for at once, which opens a connection while the link is idle; the others when what is left
//! of the metadata arrives within the round trip that their first byte takes. So the link is never idle, and the metadata
//! never shares it for long.
//!
//! What is left takes `left / rate`, with the rate seen since the answer began. Before [`SAMPLE_BYTES`] that says nothing
//! (what lies in a socket's buffer arrives at once), and a wrong guess costs no more than a shared link.

use std::time::Duration;

use tokio::sync::watch;

/// Bytes of an answer before which its rate is not known. Metadata that is shorter is not worth a turn of its own.
const SAMPLE_BYTES: u64 = 64 << 10;

/// Whether the metadata has had its turn.
#[derive(Debug)]
pub(super) struct Turn(watch::Sender<bool>);

impl Turn {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// The link is free for others.
    pub(super) fn pass(&self) {
        self.0.send_replace(true);
    }

    /// Passes the link on if it is time to: `received_bytes` of `len_bytes` are here `receiving` after the first of them,
    /// which took `round_trip` to come.
    pub(super) fn pass_if_near(&self, received_bytes: u64, len_bytes: u64, receiving: Duration, round_trip: Duration) {
        if is_near(received_bytes, len_bytes, receiving, round_trip) {
            self.pass();
        }
    }

    /// Waits until the link has been passed on.
    pub(super) async fn wait(&self) {
        // It fails only without a sender, and that is `self`.
        let _ = self.0.subscribe().wait_for(|passed| *passed).await;
    }
}

fn is_near(received_bytes: u64, len_bytes: u64, receiving: Duration, round_trip: Duration) -> bool {
    if len_bytes <= SAMPLE_BYTES {
        return true;
    }
    let left_bytes = len_bytes.saturating_sub(received_bytes);
    let enough = received_bytes >= SAMPLE_BYTES;
    // left / (received / receiving) <= round trip
    enough && u128::from(left_bytes) * receiving.as_micros() <= u128::from(received_bytes) * round_trip.as_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(20);

    fn passed_at(len_bytes: u64, bytes_per_ms: u64) -> u64 {
        let is_near_at = |ms: &u64| is_near(ms * bytes_per_ms, len_bytes, Duration::from_millis(*ms), ROUND_TRIP);
        (0..).find(is_near_at).unwrap()
    }

    #[test]
    fn a_round_trip_before_the_end() {
        assert_eq!(passed_at(1_000_000, 12_500), 60, "80 ms of transfer");
    }

    #[test]
    fn as_soon_as_the_rate_is_known_where_a_round_trip_brings_it_all() {
        assert_eq!(passed_at(1_000_000, 125_000), 1);
    }

    #[test]
    fn at_once_where_it_is_short() {
        assert_eq!(passed_at(SAMPLE_BYTES, 1), 0);
    }

    #[test]
    fn at_the_end_at_last() {
        assert!(is_near(1 << 20, 1 << 20, Duration::from_secs(100), Duration::ZERO));
    }

    #[tokio::test]
    async fn whoever_waits_goes_on() {
        let turn = Turn::new();
        turn.pass_if_near(1 << 16, 1 << 30, Duration::from_millis(1), ROUND_TRIP);
        assert!(tokio::time::timeout(Duration::from_millis(10), turn.wait()).await.is_err(), "not yet");
        let ((), ()) = tokio::join!(turn.wait(), async { turn.pass() });
        turn.wait().await;
    }
}
