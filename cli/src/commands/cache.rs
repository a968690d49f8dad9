//! `ublkimg cache`: what is in the store of this host. The daemon is asked if it runs; otherwise the store is opened here.

use ublkimg_driver::Store;
use ublkimg_driver::daemon::protocol::{
    Answer, BlobLine, CacheAnswer, CacheRequest, CacheStatus, Checked, Limits, Request,
};
use ublkimg_driver::daemon::state::Records;
use ublkimg_driver::daemon::{cache, client};
use ublkimg_driver::error::{Error, ErrorKind};

use crate::args::Global;
use crate::args::cache::{Cache, CacheAction, CacheGc, LimitArguments};
use crate::output;

/// Reading a large store takes a while.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(4 * 3600);

/// Digits of a digest that tell blob files apart.
const SHORT_DIGITS: usize = 12;

pub(super) fn run(global: &Global, command: &Cache) -> anyhow::Result<()> {
    match &command.action {
        CacheAction::Ls(ls) => match ask(global, CacheRequest::Status)? {
            CacheAnswer::Status(status) if ls.json => output::json(&status),
            CacheAnswer::Status(status) => list(&status),
            answer => Err(unexpected(answer)),
        },
        CacheAction::Verify(verify) => match ask(global, CacheRequest::Verify)? {
            CacheAnswer::Checked(checked) => report(&checked, verify.json),
            answer => Err(unexpected(answer)),
        },
        CacheAction::Gc(gc) => collect(global, gc),
        CacheAction::Pin(pin) => ask(global, CacheRequest::Pin { name: pin.target.clone() }).map(drop),
        CacheAction::Unpin(pin) => ask(global, CacheRequest::Unpin { target: pin.target.clone() }).map(drop),
    }
}

pub(super) fn ask(global: &Global, request: CacheRequest) -> anyhow::Result<CacheAnswer> {
    let directories = super::directories(global)?;
    match client::ask(&directories, &Request::Cache(request.clone()), TIMEOUT)? {
        Some(Answer::Cache(answer)) => return Ok(answer),
        Some(answer) => return Err(super::unexpected(&answer)),
        None => {}
    }
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    let store = Store::open(&directories.root)?;
    Ok(cache::serve(&store, &Records::new(directories.devices()), &Limits::default(), request)?)
}

fn unexpected(answer: CacheAnswer) -> anyhow::Error {
    super::unexpected(&Answer::Cache(answer))
}

fn list(status: &CacheStatus) -> anyhow::Result<()> {
    let rows: Vec<[String; 5]> = status.blobs.iter().map(row).collect();
    output::table(["BLOB", "PRESENT", "OF", "LAST READ", "USED BY"], &rows)?;
    for pin in &status.pins {
        output::line(&format!("pinned: {} ({})", pin.reference, pin.manifest))?;
    }
    let room = &status.room;
    let limit = status.limits.cache_bytes_max.map_or_else(String::new, |max| format!(" of {}", output::bytes(max)));
    let (used, free) = (output::bytes(room.used_bytes), output::bytes(room.free_bytes));
    output::line(&format!("{used}{limit} used, {free} free"))?;
    if room.overflowed_chunks > 0 {
        output::line(&format!(
            "{} chunks were served from memory: the disk did not take them",
            room.overflowed_chunks
        ))?;
    }
    Ok(())
}

fn row(blob: &BlobLine) -> [String; 5] {
    let digits = blob.usage.index.trim_start_matches("sha256:");
    let age_s =
        std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_secs()).saturating_sub(u64::from(blob.usage.used_s));
    let mut users = blob.devices.join(",");
    if blob.is_pinned {
        users = if users.is_empty() { "(pinned)".to_owned() } else { format!("{users} (pinned)") };
    }
    [
        digits.chars().take(SHORT_DIGITS).collect(),
        output::bytes(blob.usage.present_bytes),
        output::bytes(blob.usage.total_bytes),
        format!("{age_s} s ago"),
        if users.is_empty() { "-".to_owned() } else { users },
    ]
}

/// What was found. Damage that was dropped is no failure of the command, but nobody should overlook it.
fn report(checked: &Checked, json: bool) -> anyhow::Result<()> {
    if json {
        output::json(checked)?;
    } else {
        output::line(&format!(
            "{} blocks and {} objects are right, {} blocks and {} objects were damaged, {} blocks have no checksum",
            checked.blocks, checked.objects, checked.damaged_blocks, checked.damaged_objects, checked.unknown_blocks
        ))?;
    }
    if checked.damaged_blocks + checked.damaged_objects == 0 {
        return Ok(());
    }
    let text =
        "damaged parts of the store were mended, or dropped and are fetched again when they are read: check the disk";
    Err(Error::new(ErrorKind::Corrupt, text).into())
}

/// What is beyond the limits, and what nobody has if that is to go too. What is pinned stays whatever the limits say, so it may
/// be less.
fn would_free_bytes(status: &CacheStatus, gc: &CacheGc) -> u64 {
    let LimitArguments { cache_limit, free_floor } = gc.limits;
    let given = Limits { cache_bytes_max: cache_limit, free_bytes_min: free_floor };
    let limits = if given == Limits::default() { status.limits } else { given };
    let is_unused = |blob: &&BlobLine| blob.devices.is_empty() && !blob.is_pinned;
    let unused = status.blobs.iter().filter(is_unused).map(|blob| blob.usage.present_bytes).sum();
    status.room.excess_bytes(&limits).max(if gc.unused { unused } else { 0 })
}

fn collect(global: &Global, gc: &CacheGc) -> anyhow::Result<()> {
    if gc.dry_run {
        let CacheAnswer::Status(status) = ask(global, CacheRequest::Status)? else { return Ok(()) };
        return output::line(&format!("{} would be freed", output::bytes(would_free_bytes(&status, gc))));
    }
    let LimitArguments { cache_limit, free_floor } = gc.limits;
    let request = CacheRequest::Collect { cache_bytes_max: cache_limit, free_bytes_min: free_floor, unused: gc.unused };
    match ask(global, request)? {
        CacheAnswer::Freed { freed_bytes } => output::line(&format!("{} freed", output::bytes(freed_bytes))),
        answer => Err(unexpected(answer)),
    }
}
