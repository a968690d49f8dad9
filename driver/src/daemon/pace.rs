//! How often the server looks at something that changes only while devices are read from: often then, seldom else.

use std::time::Duration;

/// The longest pause: a daemon whose devices are idle wakes up so seldom that it takes no measurable processor time.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The pauses of one task.
#[derive(Debug)]
pub(super) struct Pace {
    shortest: Duration,
    pause: Duration,
    activity: u64,
}

impl Pace {
    /// At least `shortest`, which the first one is.
    pub(super) fn new(shortest: Duration) -> Self {
        Self { shortest, pause: shortest, activity: 0 }
    }

    /// The next pause. `activity` is another number than before if something has happened since.
    pub(super) fn next(&mut self, activity: u64) -> Duration {
        let is_idle = activity == self.activity;
        self.activity = activity;
        self.pause = if is_idle { (2 * self.pause).min(PAUSE_MAX) } else { self.shortest };
        self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_nothing_happens() {
        let mut pace = Pace::new(Duration::from_secs(1));
        let pauses: Vec<u64> = [7, 7, 7, 7, 7, 7, 7, 7, 8, 8].map(|activity| pace.next(activity).as_secs()).into();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]);
    }
}
