//! How the news that a miss has arrived gets to a queue thread that sleeps in its io_uring: through an eventfd whose read is
//! armed on that ring, as `device/completion.rs` does it, or as `IORING_OP_MSG_RING` from a ring of the thread that brings it.
//!
//! `cargo run --release -p ublkimg-driver --example wake [ROUNDS]`. The two ways alternate. Each wake is timed on both sides: from
//! before the sender enters the kernel until the sleeper has its completion, and how long the sender was kept. One line of JSON for each
//! way: medians of all wakes, and the extremes of the medians of rounds.

#![expect(unsafe_code, reason = "operations of rings that point to memory and descriptors")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::event::{EventfdFlags, eventfd};

const WAKES_PER_ROUND: usize = 2000;
/// Long enough that the sleeper sleeps again.
const PAUSE: Duration = Duration::from_micros(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Eventfd,
    MsgRing,
}

/// What the sleeper tells the sender: its descriptors first, then the moment of each wake.
enum Told {
    Ready { ring: RawFd, event: RawFd },
    Woken(Instant),
}

fn main() -> io::Result<()> {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(5);
    let mut figures = [(Way::Eventfd, Vec::new()), (Way::MsgRing, Vec::new())];
    for _ in 0..rounds {
        for (way, rounds) in &mut figures {
            rounds.push(round(*way)?);
        }
    }
    for (way, rounds) in &figures {
        let of = |kind: fn(&(f64, f64)) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(kind).collect();
            values.sort_by(f64::total_cmp);
            let at = |index: usize| values.get(index).copied().unwrap_or_default();
            format!("[{:.1}, {:.1}, {:.1}]", at(0), at(values.len() / 2), at(values.len().saturating_sub(1)))
        };
        println!(
            "{{\"way\": \"{way:?}\", \"wake_us\": {}, \"sender_us\": {}}}",
            of(|round| round.0),
            of(|round| round.1)
        );
    }
    Ok(())
}

/// Medians of one round, in microseconds: until the sleeper is awake, and until the sender is back.
fn round(way: Way) -> io::Result<(f64, f64)> {
    let (tell, told) = sync_channel(1);
    let sleeper = std::thread::spawn(move || sleep(way, &tell));
    let times = wake(way, &told);
    sleeper.join().map_err(|_| io::Error::other("the sleeper panicked"))??;
    times
}

fn wake(way: Way, told: &Receiver<Told>) -> io::Result<(f64, f64)> {
    let gone = |_| io::Error::other("the sleeper is gone");
    let Told::Ready { ring: target, event } = told.recv().map_err(gone)? else {
        return Err(io::ErrorKind::Other.into());
    };
    let mut ring = IoUring::new(4)?;
    let (mut wakes, mut sends) = (Vec::new(), Vec::new());
    for _ in 0..WAKES_PER_ROUND {
        std::thread::sleep(PAUSE);
        let began = Instant::now();
        match way {
            Way::Eventfd => {
                // SAFETY: the sleeper keeps its eventfd open until it has been woken as often as this loop runs.
                let event = unsafe { std::os::fd::BorrowedFd::borrow_raw(event) };
                rustix::io::write(event, &1u64.to_ne_bytes())?;
            }
            Way::MsgRing => {
                let message = opcode::MsgRingData::new(types::Fd(target), 0, 1, None).build();
                // SAFETY: the operation points to no memory.
                unsafe { ring.submission().push(&message) }.map_err(io::Error::other)?;
                ring.submit_and_wait(1)?;
                let result = ring.completion().next().map_or(0, |entry| entry.result());
                if result < 0 {
                    return Err(io::Error::from_raw_os_error(-result));
                }
            }
        }
        let sent = began.elapsed();
        let Told::Woken(moment) = told.recv().map_err(gone)? else { return Err(io::ErrorKind::Other.into()) };
        wakes.push(moment.duration_since(began));
        sends.push(sent);
    }
    Ok((median_us(&mut wakes), median_us(&mut sends)))
}

fn median_us(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}

fn sleep(way: Way, tell: &SyncSender<Told>) -> io::Result<()> {
    // As the ring of a queue is made.
    let mut ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC)?;
    let mut counter = Box::new(0u64);
    let gone = |_| io::Error::other("the sender is gone");
    let ready = Told::Ready { ring: ring.as_raw_fd(), event: event.as_raw_fd() };
    let mut ready = Some(ready);
    for _ in 0..WAKES_PER_ROUND {
        if way == Way::Eventfd {
            let read = opcode::Read::new(types::Fd(event.as_raw_fd()), (&raw mut *counter).cast(), 8).build();
            // SAFETY: the counter outlives the ring's use of it: the completion is awaited below.
            unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
            ring.submit()?;
        }
        if let Some(ready) = ready.take() {
            tell.send(ready).map_err(gone)?;
        }
        ring.submit_and_wait(1)?;
        let moment = Instant::now();
        while ring.completion().next().is_some() {}
        tell.send(Told::Woken(moment)).map_err(gone)?;
    }
    Ok(())
}
