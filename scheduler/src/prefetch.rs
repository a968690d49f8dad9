//! What is fetched before anyone asks for it, in the order of its worth: plans, then readers, then fills.
//!
//! All of it stays inside the window of its link, the places in flight, and the room for bytes that are not decoded
//! yet. While a demand is on a link, nothing but the plan that the reader follows goes on there, and that only as far
//! as the window reaches that the demand found: so whatever a demand shares the link with is at most one window.

use crate::flight::{Flight, Request};
use crate::guard::Level;
use crate::plan::{Plan, Want};
use crate::scheduler::Scheduler;
use crate::table::{Chunk, State};
use crate::types::{Action, BlobKey, BlobKind, ChunkKey, Class, FillMode, ImageKey, LinkKey, Now};

/// Neighbours in a layer are fetched with one request only if they are neighbours in the plan too, give or take so many
/// ranks: what a range brings early delays what was to come before it.
const RANK_GAP: u32 = 2;

/// What came of offering a turn.
enum Turn {
    Issued(u64),
    /// The image wants more than its share.
    Short,
    /// There is no room on the link.
    Full,
    /// The image has nothing to ask for now, or ever again.
    Nothing {
        ever: bool,
    },
}

impl Scheduler {
    pub(crate) fn issue_prefetch(&mut self, now: Now, actions: &mut Vec<Action>) {
        let links: Vec<LinkKey> = self.links.keys().copied().collect();
        for &key in &links {
            self.issue_plans(key, now, actions);
        }
        self.issue_read_ahead(now, actions);
        for &key in &links {
            self.issue_fills(key, now, actions);
            if let Some(link) = self.links.get_mut(&key)
                && link.is_idle(now)
            {
                link.estimator.set_idle(link.in_flight_bytes());
            }
        }
        self.arm(now, actions);
    }

    fn issue_plans(&mut self, key: LinkKey, now: Now, actions: &mut Vec<Action>) {
        let mut resting = 0;
        while let Some(link) = self.links.get_mut(&key)
            && resting < link.plans.len()
            && let Some((image, share_bytes)) = link.plans.turn()
        {
            let turn = self.issue_plan(image, share_bytes, now, actions);
            let Some(link) = self.links.get_mut(&key) else { return };
            match turn {
                Turn::Issued(bytes) => {
                    link.plans.spend(bytes);
                    resting = 0;
                }
                Turn::Short => link.plans.pass(),
                Turn::Full => return,
                Turn::Nothing { ever: true } => link.plans.remove(image),
                Turn::Nothing { ever: false } => {
                    link.plans.rest();
                    resting += 1;
                }
            }
        }
    }

    fn issue_plan(&mut self, key: ImageKey, share_bytes: u64, now: Now, actions: &mut Vec<Action>) -> Turn {
        let Some(plan) = self.images.get_mut(&key).and_then(|image| image.plan.as_mut()) else {
            return Turn::Nothing { ever: true };
        };
        let (table, failures) = (&self.table, &self.failures);
        let want = |chunk| match table.state(chunk) {
            Some(State::Absent) => match failures.get(&chunk) {
                Some((until, _)) if now < *until => Want::Later(*until),
                _ => Want::Fetch,
            },
            _ => Want::Nothing,
        };
        let Some((rank, first)) = plan.peek(now, want) else { return Turn::Nothing { ever: plan.is_over() } };
        let (level, left_bytes) = (plan.level(), plan.left_bytes());
        let Some(first_bytes) = self.len_bytes(first) else { return Turn::Nothing { ever: false } };
        if first_bytes > left_bytes {
            return Turn::Nothing { ever: true };
        }
        let room_bytes = self.room_bytes(first.blob, Class::Trace, level, first_bytes, now);
        if room_bytes == 0 {
            return Turn::Full;
        }
        if first_bytes > share_bytes {
            return Turn::Short;
        }
        let most_bytes = room_bytes.min(share_bytes).min(left_bytes);
        let end = self.end_of_range(key, rank, first, most_bytes, now);
        let bytes = self.issue(first, end, Class::Trace, Some(key), now, now, actions);
        if let Some(plan) = self.images.get_mut(&key).and_then(|image| image.plan.as_mut()) {
            plan.spend(bytes);
        }
        Turn::Issued(bytes)
    }

    /// How far a range from `first` goes: over the neighbours that come next in the plan as well.
    fn end_of_range(&self, image: ImageKey, rank: u32, first: ChunkKey, most_bytes: u64, now: Now) -> u32 {
        let Some(plan) = self.images.get(&image).and_then(|image| image.plan.as_ref()) else { return first.chunk + 1 };
        let gap = match self.table.blob(first.blob).map(|blob| blob.kind) {
            Some(BlobKind::Hot) => u32::MAX,
            _ => RANK_GAP,
        };
        self.range_end(first, most_bytes, |chunk| {
            let last = rank.saturating_add(chunk.chunk - first.chunk).saturating_add(gap);
            plan.rank(chunk).is_some_and(|rank| rank <= last && plan.is_open(rank))
                && self.recent_failure(chunk, now).is_none()
        })
    }

    /// The end of the longest range of absent chunks from `first`, of at most half of the window.
    fn range_end(&self, first: ChunkKey, most_bytes: u64, may: impl Fn(ChunkKey) -> bool) -> u32 {
        let mut end = first.chunk + 1;
        let Some(blob) = self.table.blob(first.blob) else { return end };
        let longest = self.links.get(&blob.link).map_or(0, |link| link.estimator.range_bytes());
        let most_bytes = most_bytes.min(longest);
        let (most_chunks, _) = self.flights.room();
        let mut bytes = self.table.chunk(first).map_or(0, Chunk::len_bytes);
        while blob.is_followed(end - 1) && ((end - first.chunk) as usize) < most_chunks {
            let next = ChunkKey { blob: first.blob, chunk: end };
            let Some(chunk) = self.table.chunk(next) else { break };
            bytes += chunk.len_bytes();
            if bytes > most_bytes || chunk.state != State::Absent || !may(next) {
                break;
            }
            end += 1;
        }
        end
    }

    fn issue_read_ahead(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut streams = std::mem::take(&mut self.streams);
        let room = |policy: &Self, blob: BlobKey, chunk_bytes| {
            policy.room_bytes(blob, Class::ReadAhead, Level::Followed, chunk_bytes, now)
        };
        while let Some(chunk) = streams.next(|blob| room(self, blob, 1) > 0) {
            let Some(bytes) = self.len_bytes(chunk) else { continue };
            if self.table.state(chunk) != Some(State::Absent) || self.recent_failure(chunk, now).is_some() {
                continue;
            }
            if room(self, chunk.blob, bytes) == 0 {
                streams.put_back();
                break;
            }
            self.issue(chunk, chunk.chunk + 1, Class::ReadAhead, None, now, now, actions);
        }
        self.streams = streams;
    }

    fn issue_fills(&mut self, key: LinkKey, now: Now, actions: &mut Vec<Action>) {
        let mut resting = 0;
        while let Some(link) = self.links.get_mut(&key)
            && resting < link.fills.len()
            && !self.streams.wants(|blob| self.table.blob(blob).is_some_and(|blob| blob.link == key))
            && let Some((image, share_bytes)) = link.fills.turn()
        {
            let turn = self.issue_fill(key, image, share_bytes, now, actions);
            let Some(link) = self.links.get_mut(&key) else { return };
            match turn {
                Turn::Issued(bytes) => {
                    link.fills.spend(bytes);
                    resting = 0;
                }
                Turn::Short => link.fills.pass(),
                Turn::Full => return,
                Turn::Nothing { ever: true } => link.fills.remove(image),
                Turn::Nothing { ever: false } => {
                    link.fills.rest();
                    resting += 1;
                }
            }
        }
    }

    fn issue_fill(
        &mut self,
        ring: LinkKey,
        key: ImageKey,
        share_bytes: u64,
        now: Now,
        actions: &mut Vec<Action>,
    ) -> Turn {
        if self.has_plan_to_follow(ring) {
            return Turn::Full;
        }
        let Some(fill) = self.images.get_mut(&key).and_then(|image| image.fill.as_mut()) else {
            return Turn::Nothing { ever: true };
        };
        let mode = fill.mode;
        let Some(first) = fill.peek(now, &self.table) else { return Turn::Nothing { ever: fill.at_end() } };
        let Some(link) = self.table.blob(first.blob).map(|blob| blob.link) else {
            return Turn::Nothing { ever: false };
        };
        let Some(first_bytes) = self.len_bytes(first) else { return Turn::Nothing { ever: false } };
        if self.recent_failure(first, now).is_some() {
            self.pass_fill(key, first.chunk + 1);
            return Turn::Issued(0);
        }
        if mode == FillMode::Idle && self.links.get(&link).is_none_or(|link| !link.may_fill_idly(now)) {
            return Turn::Nothing { ever: false };
        }
        let room_bytes = self.room_bytes(first.blob, Class::Fill, Level::Followed, first_bytes, now);
        if room_bytes == 0 {
            return Turn::Full;
        }
        if first_bytes > share_bytes {
            return Turn::Short;
        }
        let end = self.range_end(first, room_bytes.min(share_bytes), |chunk| self.recent_failure(chunk, now).is_none());
        let bytes = self.issue(first, end, Class::Fill, Some(key), now, now, actions);
        self.pass_fill(key, end);
        if mode == FillMode::Idle
            && let Some(link) = self.links.get_mut(&link)
        {
            link.fills_idly(bytes, now);
        }
        Turn::Issued(bytes)
    }

    fn pass_fill(&mut self, image: ImageKey, chunks_end: u32) {
        if let Some(fill) = self.images.get_mut(&image).and_then(|image| image.fill.as_mut()) {
            fill.pass(chunks_end);
        }
    }

    /// Whether a plan still has something to fetch on a link.
    fn has_plan_to_follow(&self, link: LinkKey) -> bool {
        let Some(link) = self.links.get(&link) else { return false };
        let plan = |image| self.images.get(&image).and_then(|image| image.plan.as_ref());
        link.plans.images().any(|image| plan(image).is_some_and(Plan::is_followed))
    }

    fn len_bytes(&self, chunk: ChunkKey) -> Option<u64> {
        self.table.chunk(chunk).map(Chunk::len_bytes)
    }

    /// Bytes that may be asked for now, in a request that begins with a chunk of so many; 0 is none.
    fn room_bytes(&self, blob: BlobKey, class: Class, level: Level, chunk_bytes: u64, now: Now) -> u64 {
        let (chunks, bytes) = self.flights.room();
        let Some(blob) = self.table.blob(blob) else { return 0 };
        let Some(link) = self.links.get(&blob.link) else { return 0 };
        let room = link.room_bytes(class, level, chunk_bytes, now).min(bytes);
        if chunks == 0 || room < chunk_bytes { 0 } else { room }
    }

    /// Issues one request, and says how many bytes it is for.
    #[expect(clippy::too_many_arguments, reason = "they make up one request")]
    pub(crate) fn issue(
        &mut self,
        first: ChunkKey,
        end: u32,
        class: Class,
        image: Option<ImageKey>,
        since: Now,
        now: Now,
        actions: &mut Vec<Action>,
    ) -> u64 {
        let Some(link_key) = self.table.blob(first.blob).map(|blob| blob.link) else { return 0 };
        let Some(link) = self.links.get_mut(&link_key) else { return 0 };
        let chunks = first.chunk..end;
        let (mark, left) = (link.estimator.mark(now), chunks.end - chunks.start);
        let request = Request { mark, link: link_key, class, left, has_first_byte: false };
        let fetch = self.flights.open(request);
        let mut bytes = 0;
        for chunk in chunks.clone() {
            let key = ChunkKey { blob: first.blob, chunk };
            let Some(chunk) = self.table.chunk_mut(key) else { continue };
            chunk.prefetched = class != Class::Demand;
            let len_bytes = chunk.len_bytes();
            let is_absent = matches!(chunk.state, State::Absent | State::Queued);
            self.table.set_state(key, State::InFlight);
            let flight = Flight { class, link: link_key, fetch, len_bytes, image, late_hit: None, has_arrived: false };
            if !self.flights.add(key, flight) || !is_absent {
                debug_assert!(false, "{key:?} is in flight or present already");
                self.counters.duplicates += 1;
            }
            bytes += len_bytes;
        }
        link.issued(class, bytes, now);
        self.counters.issued(class, u64::from(left), bytes);
        if let Some(image) = image.and_then(|image| self.images.get_mut(&image)) {
            image.counters.issued(class, bytes);
        }
        actions.push(Action::Fetch { fetch, blob: first.blob, chunks, class, since });
        bytes
    }

    /// Asks for a tick when time alone will allow something.
    fn arm(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut first: Option<Now> = None;
        let mut add = |at: Now| {
            if at > now {
                first = Some(first.map_or(at, |first| first.min(at)));
            }
        };
        for link in self.links.values() {
            let image = |image| self.images.get(&image);
            for plan in link.plans.images().filter_map(image).filter_map(|image| image.plan.as_ref()) {
                plan.retry_at().into_iter().for_each(&mut add);
            }
            for fill in link.fills.images().filter_map(image).filter_map(|image| image.fill.as_ref()) {
                fill.resume_at().into_iter().for_each(&mut add);
                if fill.mode == FillMode::Idle {
                    link.idle_fill_at().into_iter().for_each(&mut add);
                }
            }
        }
        let Some(at) = first else { return };
        if self.armed.is_none_or(|armed| armed <= now || at < armed) {
            self.armed = Some(at);
            actions.push(Action::WakeAt { at });
        }
    }
}
