//! Whether a plan is worth following: a trace may be of another command, of an older image, or hostile.
//!
//! Three witnesses; the worst of them decides. The reads so far, as a balance that a read which the plan knows raises
//! and another lowers, as does each jump of the plan: one that is wholly wrong is dropped after two reads, one that was
//! right for long survives a digression. The last 64 first reads: how many of them the plan knew. The entries that are
//! due, which the position has passed: how many of them were read, without which a plan that names everything would
//! look right. A read that the plan knows for quite another time speaks neither for nor against it.
//!
//! Nothing is final: reads go on being judged while the plan rests, so one that starts late, or has a hole, is taken up.

/// How far a plan is followed. The order is that of trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Not at all.
    Dropped,
    /// With half of the window, and only the entries that most recordings had.
    Narrowed,
    /// Wholly.
    Followed,
}

/// What a read inside the plan adds to the balance is 1; one outside takes this.
const COST: u32 = 2;

/// What a jump takes. A part that is left out is followed by a long run of reads in order; in a plan without any order
/// each jump leads to the next.
const JUMP_COST: u32 = 4;

/// Balance of a new plan: the first read outside it narrows it, the second drops it.
const BALANCE_START: u32 = 3;

/// Most that reads inside the plan save up: six reads outside it in a row drop it.
const BALANCE_MAX: u32 = 12;

/// A plan that was dropped is taken up again with this balance.
const BALANCE_RESUME: u32 = 4;

/// First reads that are remembered: the bits of a word.
const RECENT: u32 = u64::BITS;

/// First reads, and due entries, before their shares say anything.
const RECENT_MIN: u32 = 16;
const DUE_MIN: u32 = 64;

/// Shares in percent below which a plan is narrowed, and dropped. Blocks taken at random know a tenth of the reads of a
/// start, or a third where an image is small; a trace of another program with the same libraries half or more.
const RECENT_PERCENT: [u32; 2] = [67, 40];

/// Of entries that are due fewer may be read: what is fetched in vain costs bytes, and delays nobody by more than a window.
const DUE_PERCENT: [u32; 2] = [50, 20];

/// Due entries after which older ones count half.
const DUE_MAX: u32 = 512;

/// The judge of one plan.
#[derive(Debug)]
pub(crate) struct Guard {
    balance: u32,
    /// The balance was spent.
    dropped: bool,
    /// A bit for each of the last first reads, 1 if the plan knew it.
    recent: u64,
    recent_count: u32,
    due: u32,
    due_read: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Self { balance: BALANCE_START, dropped: false, recent: 0, recent_count: 0, due: 0, due_read: 0 }
    }
}

impl Guard {
    /// A first read, and whether the plan knew it.
    pub(crate) fn read(&mut self, known: bool) {
        self.balance = if known { (self.balance + 1).min(BALANCE_MAX) } else { self.balance.saturating_sub(COST) };
        self.dropped = self.balance == 0 || self.dropped && self.balance < BALANCE_RESUME;
        self.recent = self.recent << 1 | u64::from(known);
        self.recent_count = (self.recent_count + 1).min(RECENT);
    }

    /// The plan goes on elsewhere.
    pub(crate) fn jumped(&mut self) {
        self.balance = self.balance.saturating_sub(JUMP_COST);
        self.dropped |= self.balance == 0;
    }

    /// The position has passed an entry: was it read?
    pub(crate) fn due(&mut self, read: bool) {
        self.due += 1;
        self.due_read += u32::from(read);
        if self.due >= DUE_MAX {
            (self.due, self.due_read) = (self.due / 2, self.due_read / 2);
        }
    }

    pub(crate) fn level(&self) -> Level {
        let balance = match self.balance {
            _ if self.dropped => Level::Dropped,
            0 | 1 => Level::Narrowed,
            _ => Level::Followed,
        };
        let recent = by_share(self.recent.count_ones(), self.recent_count, RECENT_MIN, RECENT_PERCENT);
        let due = by_share(self.due_read, self.due, DUE_MIN, DUE_PERCENT);
        balance.min(recent).min(due)
    }
}

fn by_share(part: u32, all: u32, all_min: u32, percent: [u32; 2]) -> Level {
    let [narrows, drops] = percent;
    if all < all_min || part * 100 >= all * narrows {
        Level::Followed
    } else if part * 100 >= all * drops {
        Level::Narrowed
    } else {
        Level::Dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(reads: &[bool]) -> Level {
        let mut guard = Guard::default();
        reads.iter().for_each(|known| guard.read(*known));
        guard.level()
    }

    #[test]
    fn a_wholly_wrong_plan_is_dropped_after_two_reads() {
        assert_eq!(after(&[]), Level::Followed);
        assert_eq!(after(&[false]), Level::Narrowed);
        assert_eq!(after(&[false, false]), Level::Dropped);
    }

    #[test]
    fn a_plan_that_was_right_survives_a_digression_and_comes_back_after_a_long_one() {
        let mut guard = Guard::default();
        (0..100).for_each(|_| guard.read(true));
        (0..5).for_each(|_| guard.read(false));
        assert_eq!(guard.level(), Level::Followed);
        (0..60).for_each(|_| guard.read(false));
        assert_eq!(guard.level(), Level::Dropped);
        (0..50).for_each(|_| guard.read(true));
        assert_eq!(guard.level(), Level::Followed);
    }

    #[test]
    fn a_plan_that_knows_too_little_is_narrowed() {
        let reads: Vec<bool> = (0..64).map(|read| read % 5 < 2).collect();
        assert!(after(&reads) <= Level::Narrowed);
    }

    #[test]
    fn a_plan_that_names_far_too_much_is_dropped() {
        let mut guard = Guard::default();
        (0..100).for_each(|_| guard.read(true));
        (0..63).for_each(|_| guard.due(false));
        assert_eq!(guard.level(), Level::Followed);
        guard.due(false);
        assert_eq!(guard.level(), Level::Dropped);
        (0..30).for_each(|_| guard.due(true));
        assert_eq!(guard.level(), Level::Narrowed);
    }
}
