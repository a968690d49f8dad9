//! What happens to devices when processes end: each server here is a process of its own, this very program.
//!
//! Run by `cargo test`; takes parts of tests' names as filters.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, unused_imports, reason = "each test uses its part of what they share")]

#[path = "../src/fixture.rs"]
mod fixture;
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use support::image::{Driver, Origin};
use support::scenarios::compare_device;
use support::{open_direct, read_blocks, wait_until};
// The fixture's `crate::image`.
use ublkimg_driver::daemon::{Directories, ServerOptions, run_server};
use ublkimg_driver::device::{Prepared, QueueOptions, Transport, ublk};
use ublkimg_driver::image;
use ublkimg_driver::store::Limits;
use ublkimg_driver::{ErrorKind, mounts, namespace};
use ublkimg_tests::fault_row::FaultRow;

/// How long a chunk takes: a reader of the whole device is not done when its server is killed.
const CHUNK_DELAY_MS: u64 = 20;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("server") => return server(&arguments[1..]),
        Some("half-way") => return half_way(&arguments[1..]),
        Some("daemon") => return daemon(&arguments[1..]),
        _ => {}
    }
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let tests: [(&str, fn()); 8] = [
        ("a_reader_does_not_notice_that_its_server_was_killed", a_reader_does_not_notice_that_its_server_was_killed),
        ("a_device_without_a_server_can_be_deleted", a_device_without_a_server_can_be_deleted),
        ("a_server_ends_although_its_device_is_mounted", a_server_ends_although_its_device_is_mounted),
        ("a_device_that_was_not_started_is_taken_back", a_device_that_was_not_started_is_taken_back),
        (
            "a_device_whose_server_was_killed_before_its_start_is_deleted_by_the_next",
            a_device_whose_server_was_killed_before_its_start_is_deleted_by_the_next,
        ),
        ("a_server_that_is_killed_half_way_through_a_recovery", a_server_that_is_killed_half_way_through_a_recovery),
        ("a_mounted_device_goes_when_it_is_unmounted", a_mounted_device_goes_when_it_is_unmounted),
        ("a_killed_fuse_server_leaves_nothing", a_killed_fuse_server_leaves_nothing),
    ];
    let is_wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    for (name, test) in tests.into_iter().filter(|(name, _)| is_wanted(name)) {
        println!("test {name} ...");
        let start = Instant::now();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(test).unwrap();
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        println!("test {name} ok, {:.1} s", start.elapsed().as_secs_f32());
    }
}

/// `server TRANSPORT REFERENCE DIRECTORY [ID]`: serves the image, as a new device or the one that it recovers. Says on
/// stdout what was detached from its namespace and where the device is. Ends when its stdin says so.
fn server(arguments: &[String]) {
    let [transport, reference, directory, rest @ ..] = arguments else { panic!("server: {arguments:?}") };
    let directory = Path::new(directory);
    let detached = namespace::enter_private(&[directory]).unwrap();
    let driver = Driver::attach(reference, &directory.join("store"));
    let prepared = match rest.first() {
        Some(id) => Prepared::recover(driver.image.clone(), id.parse().unwrap()),
        None => Prepared::new(
            Transport::from_str(transport).unwrap(),
            driver.image.clone(),
            QueueOptions::default(),
            &directory.join("run"),
        ),
    };
    let device = prepared.unwrap().start().unwrap();
    println!("{}", detached.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(" "));
    println!("{}", device.path().display());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    match line.trim() {
        "stop" => println!("{:?}", device.stop().map_err(|error| error.kind())),
        _ => device.abandon(),
    }
}

/// `half-way REFERENCE DIRECTORY [ID]`: adds a device, or begins to recover that one, says which it is, and goes no further.
fn half_way(arguments: &[String]) {
    let [reference, directory, rest @ ..] = arguments else { panic!("half-way: {arguments:?}") };
    let directory = Path::new(directory);
    namespace::enter_private(&[directory]).unwrap();
    let driver = Driver::attach(reference, &directory.join("store"));
    let prepared = match rest.first() {
        Some(id) => Prepared::recover(driver.image.clone(), id.parse().unwrap()),
        None => Prepared::new(Transport::Ublk, driver.image.clone(), QueueOptions::default(), directory),
    };
    let prepared = prepared.unwrap();
    println!("{}", prepared.ublk_id().unwrap());
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// `daemon DIRECTORY`: the server as it is in use.
fn daemon(arguments: &[String]) {
    let directory = Path::new(&arguments[0]);
    let directories = Directories { root: directory.join("root"), run: directory.join("run") };
    run_server(ServerOptions {
        directories,
        limits: Limits::default(),
        recovery_timeout: Duration::from_secs(60),
        takes_over: false,
    })
    .unwrap();
}

/// This program in another role.
fn in_role(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(role).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A process that has come half way, and its device.
fn come_half_way(origin: &Origin, directory: &Path, recover: Option<u32>) -> (Child, u32) {
    let mut command = in_role("half-way");
    command.arg(origin.reference()).arg(directory).args(recover.map(|id| id.to_string()));
    let mut process = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    (process, line.trim_end().parse().expect("it did not come half way"))
}

/// kill -9.
fn kill(mut process: Child) {
    process.kill().unwrap();
    process.wait().unwrap();
}

struct Server {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    detached: String,
    path: PathBuf,
}

impl Server {
    fn start(transport: Transport, origin: &Origin, directory: &Path, recover: Option<u32>) -> Self {
        let mut command = in_role("server");
        command.args([&transport.to_string(), &origin.reference()]).arg(directory);
        let mut process = command.args(recover.map(|id| id.to_string())).spawn().unwrap();
        let stdin = process.stdin.take().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let mut server = Self { process, stdin, stdout, detached: String::new(), path: PathBuf::new() };
        server.detached = server.line();
        server.path = PathBuf::from(server.line());
        assert!(server.path.starts_with("/dev"), "the server did not start");
        server
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn id(&self) -> u32 {
        self.path.to_str().unwrap().trim_start_matches("/dev/ublkb").parse().unwrap()
    }

    /// kill -9.
    fn kill(mut self) {
        self.process.kill().unwrap();
        self.ended("a killed server");
    }

    fn stop(mut self) -> String {
        writeln!(self.stdin, "stop").unwrap();
        let outcome = self.line();
        self.ended("a server that stopped its device");
        outcome
    }

    /// Ends like a server that is replaced: the device stays.
    fn abandon(mut self) {
        writeln!(self.stdin, "abandon").unwrap();
        self.ended("a server that abandoned its device");
    }

    fn ended(&mut self, what: &str) {
        wait_until(what, Duration::from_secs(10), || self.process.try_wait().unwrap().is_some());
    }
}

fn have_ublk() -> bool {
    let have = Path::new("/dev/ublk-control").exists();
    if !have {
        println!("SKIP: no /dev/ublk-control here; driver/tests/in-guest.sh runs this test in a guest");
    }
    have
}

fn state(id: u32) -> Option<ublk::DeviceState> {
    ublk::devices().unwrap().into_iter().find(|device| device.id == id).map(|device| device.state)
}

fn wait_for_quiesced(id: u32) {
    let quiesced = || state(id) == Some(ublk::DeviceState::Quiesced);
    wait_until("a device without its server", Duration::from_secs(10), quiesced);
}

fn a_reader_does_not_notice_that_its_server_was_killed() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    origin.delay(CHUNK_DELAY_MS);
    let first = Server::start(Transport::Ublk, &origin, directory.path(), None);
    let (id, path) = (first.id(), first.path.clone());
    let reader = {
        let (path, content) = (path.clone(), origin.content());
        std::thread::spawn(move || compare_device(&path, &content))
    };
    std::thread::sleep(Duration::from_millis(5 * CHUNK_DELAY_MS));
    assert!(!reader.is_finished(), "the reader is too quick for this test");
    first.kill();
    wait_for_quiesced(id);
    let second = Server::start(Transport::Ublk, &origin, directory.path(), Some(id));
    assert_eq!(second.path, path);
    std::thread::sleep(Duration::from_millis(5 * CHUNK_DELAY_MS));
    let fault = FaultRow::begins("`kill -9` of a server that has just recovered a device");
    second.kill();
    // At once: the kernel may still be busy with the dead server.
    let third = Server::start(Transport::Ublk, &origin, directory.path(), Some(id));
    fault.ends("the reader waits for the next server: data");
    reader.join().unwrap();
    assert_eq!(third.stop(), "Ok(())");
    assert_eq!(state(id), None);
    assert!(!path.exists());
}

fn a_device_without_a_server_can_be_deleted() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let server = Server::start(Transport::Ublk, &origin, directory.path(), None);
    let (id, path) = (server.id(), server.path.clone());
    origin.hold();
    let block = origin.chunk_block(20);
    let reader = std::thread::spawn(move || read_blocks(&open_direct(&path), block, 1));
    std::thread::sleep(Duration::from_millis(100));
    server.kill();
    wait_for_quiesced(id);
    let start = Instant::now();
    ublk::delete(id).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "deleting took {:?}", start.elapsed());
    assert!(reader.join().unwrap().is_err());
    assert_eq!(state(id), None);
    assert_eq!(ublk::delete(id).unwrap_err().kind(), ErrorKind::NotFound);
}

fn a_device_that_was_not_started_is_taken_back() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let driver = Driver::attach(&origin.reference(), &directory.path().join("store"));
    let prepared =
        Prepared::new(Transport::Ublk, driver.image.clone(), QueueOptions::default(), directory.path()).unwrap();
    let id = prepared.ublk_id().unwrap();
    assert_eq!(state(id), Some(ublk::DeviceState::Dead));
    drop(prepared);
    assert_eq!(state(id), None);
    assert_eq!(Prepared::recover(driver.image.clone(), id).unwrap_err().kind(), ErrorKind::NotFound);
}

fn a_device_whose_server_was_killed_before_its_start_is_deleted_by_the_next() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let (process, id) = come_half_way(&origin, directory.path(), None);
    assert_eq!(state(id), Some(ublk::DeviceState::Dead));
    let fault = FaultRow::begins("`kill -9` between adding a device and its start");
    kill(process);
    assert_eq!(state(id), Some(ublk::DeviceState::Dead), "it is left to the next server");
    let next = in_role("daemon").arg(directory.path()).spawn().unwrap();
    wait_until("a deleted device", Duration::from_secs(30), || state(id).is_none());
    fault.ends("the next server deletes the device");
    kill(next);
}

fn a_server_that_is_killed_half_way_through_a_recovery() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let first = Server::start(Transport::Ublk, &origin, directory.path(), None);
    let (id, path) = (first.id(), first.path.clone());
    first.kill();
    wait_for_quiesced(id);
    let content = origin.content();
    let reader = std::thread::spawn(move || compare_device(&path, &content));
    let (process, recovering) = come_half_way(&origin, directory.path(), Some(id));
    assert_eq!(recovering, id);
    let fault = FaultRow::begins("`kill -9` of a server amid the recovery of a device");
    kill(process);
    assert!(!reader.is_finished(), "nobody has served");
    let next = Server::start(Transport::Ublk, &origin, directory.path(), Some(id));
    reader.join().unwrap();
    fault.ends("the reader waits for the next server: data");
    assert_eq!(next.stop(), "Ok(())");
    assert_eq!(state(id), None);
}

fn a_server_ends_although_its_device_is_mounted() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let mount_point = directory.path().join("mount");
    std::fs::create_dir(&mount_point).unwrap();
    let first = Server::start(Transport::Ublk, &origin, directory.path(), None);
    let id = first.id();
    mounts::mount_erofs(&first.path, &mount_point).unwrap();
    // Something on top, at the same place.
    rustix::mount::mount("tmpfs", &mount_point, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let number = mounts::device_number(&first.path).unwrap();
    let holders = mounts::holders(number).unwrap();
    assert!(holders.iter().any(|holder| holder.mount_points.contains(&mount_point)), "{holders:?}");
    let fault = FaultRow::begins("`kill -9` while the device is mounted");
    first.kill();
    let second = Server::start(Transport::Ublk, &origin, directory.path(), Some(id));
    fault.ends("the server ends, the mount stays, the next one takes the device back");
    let place = mount_point.to_str().unwrap();
    assert_eq!(second.detached.matches(place).count(), 2, "detached: {}", second.detached);
    second.abandon();
    wait_for_quiesced(id);
    let third = Server::start(Transport::Ublk, &origin, directory.path(), Some(id));
    mounts::unmount(&mount_point).unwrap();
    assert_eq!(mounts::at(&mount_point).unwrap().unwrap().fs_type, "erofs");
    assert_eq!(std::fs::read_dir(&mount_point).unwrap().count(), 0);
    mounts::unmount(&mount_point).unwrap();
    assert_eq!(mounts::holders(number).unwrap(), []);
    assert_eq!(mounts::unmount(&mount_point).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(third.stop(), "Ok(())");
}

fn a_mounted_device_goes_when_it_is_unmounted() {
    if !have_ublk() {
        return;
    }
    let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
    let mount_point = directory.path().join("mount");
    std::fs::create_dir(&mount_point).unwrap();
    let server = Server::start(Transport::Ublk, &origin, directory.path(), None);
    let id = server.id();
    mounts::mount_erofs(&server.path, &mount_point).unwrap();
    assert_eq!(server.stop(), "Err(Busy)");
    mounts::unmount(&mount_point).unwrap();
    wait_until("a deleted device", Duration::from_secs(5), || state(id).is_none());
}

fn a_killed_fuse_server_leaves_nothing() {
    for path in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(path).exists() || !rustix::process::geteuid().is_root() {
            return println!("SKIP: no {path} here, or not root");
        }
    }
    // Who has the device open when the server is killed: a reader that waits, or nobody but the server itself, while the
    // read of one that was killed is still under way.
    for kill_the_reader in [false, true] {
        let (origin, directory) = (Origin::start(), tempfile::tempdir().unwrap());
        let server = Server::start(Transport::Fuse, &origin, directory.path(), None);
        origin.hold();
        let backing = Path::new("/sys/class/block").join(server.path.file_name().unwrap()).join("loop/backing_file");
        let ours = std::fs::read_to_string(&backing).unwrap();
        assert!(ours.contains(directory.path().to_str().unwrap()));
        let mut command = Command::new("dd");
        command.arg(format!("if={}", server.path.display())).args(["of=/dev/null", "bs=4k", "skip=500", "count=1"]);
        let mut reader = command.stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert!(reader.try_wait().unwrap().is_none(), "the reader does not wait");
        if kill_the_reader {
            reader.kill().unwrap();
            assert!(!reader.wait().unwrap().success());
        }
        let fault = FaultRow::begins("`kill -9` of a FUSE server");
        server.kill();
        assert!(!reader.wait().unwrap().success());
        fault.ends("EIO; nothing is left");
        wait_until("a free loop device", Duration::from_secs(5), || {
            std::fs::read_to_string(&backing).ok() != Some(ours.clone())
        });
    }
}
