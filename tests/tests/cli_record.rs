//! Recording a start, what the next start makes of it, and filling an image, as scripts use them, on this machine's kernel.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use ublkimg_image::Trace;
use ublkimg_tests::command::ublkimg_path;
use ublkimg_tests::host::{self, Host, wait_until};
use ublkimg_tests::leaks;
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Auth, Fault, Toxic};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};

/// Blocks of each of the two files of the image.
const FILE_BLOCKS: u32 = 512;

/// A host with an image of two files that do not compress, as `data:v1`.
fn host_with_data() -> Host {
    let host = Host::new(Auth::Anonymous);
    let file = |name: &str, seed| Entry::file(name, noise(seed, FILE_BLOCKS as usize * 4096));
    let tar = archive(&[file("first", 1), file("second", 2)], LongNames::Pax);
    let layers = [Layer { tar, compression: Compression::None }];
    OciLayout::create(&host.root.join("source")).unwrap().add_image("v1", &layers).unwrap();
    host.convert("source", "data");
    host
}

fn add(host: &Host, arguments: &[&str]) -> PathBuf {
    let mount = host.root.join("mnt");
    let mut all = vec!["--mount", mount.to_str().unwrap(), "--read-timeout", "5s"];
    all.extend(arguments);
    host.add("data", &all).success();
    mount
}

fn status(host: &Host, target: &str) -> Value {
    serde_json::from_str(&host.ublkimg(&["status", "--json", target]).success().stdout).unwrap()
}

fn read_ahead_kb(device: &str) -> u32 {
    let name = Path::new(device).file_name().unwrap().to_str().unwrap();
    std::fs::read_to_string(format!("/sys/block/{name}/queue/read_ahead_kb")).unwrap().trim().parse().unwrap()
}

fn read_pages(file: &Path, pages: &[u32]) {
    let file = std::fs::File::open(file).unwrap();
    for page in pages {
        file.read_exact_at(&mut [0; 4096], u64::from(*page) * 4096).unwrap();
    }
}

fn trace(file: &Path) -> Trace {
    let encoded = zstd::bulk::decompress(&std::fs::read(file).unwrap(), 32 << 20).unwrap();
    Trace::decode(&encoded).unwrap()
}

/// Traces that the host keeps.
fn kept(host: &Host) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(host.root.join("store/traces")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "trace")).collect()
}

#[test]
fn a_recording_holds_exactly_what_was_read_in_that_order() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_data();
    let mount = add(&host, &["--no-record"]);
    let device = status(&host, "data-v1")["device"].as_str().unwrap().to_owned();
    assert_eq!(read_ahead_kb(&device), 128);
    host.ublkimg(&["record", "stop", "data-v1", "-o", "/dev/null"]).refused(3, &["data-v1", "not recorded"]);

    host.ublkimg(&["record", "start", "data-v1", "--read-ahead-kb", "0", "--command", "read", "-x"]).success();
    assert_eq!(read_ahead_kb(&device), 0);
    let pages = [400, 7, 8, 9, 100, 3, 400, 7];
    read_pages(&mount.join("second"), &pages);
    std::thread::sleep(Duration::from_millis(30));
    read_pages(&mount.join("second"), &[200]);
    host.ublkimg(&["ready", "data-v1"]).success();
    let file = host.root.join("a.trace");
    host.ublkimg(&["record", "stop", mount.to_str().unwrap(), "-o", file.to_str().unwrap()]).success();
    assert_eq!(read_ahead_kb(&device), 128);

    let trace = trace(&file);
    assert_eq!(trace.header.command, ["read", "-x"]);
    assert_eq!((trace.header.read_ahead_kb, trace.header.runs, trace.header.lost), (0, 1, 0));
    let blocks = trace.entries.iter().flat_map(|entry| entry.block..entry.block + u32::from(entry.blocks));
    let blocks: Vec<u32> = blocks.collect();
    let base = blocks[0] - 400;
    let relative: Vec<u32> = blocks.iter().map(|block| block - base).collect();
    assert_eq!(relative, [400, 7, 8, 9, 100, 3, 200]);
    let last = trace.entries.last().unwrap().since_previous_us;
    assert!((30_000..5_000_000).contains(&last), "the program thought for 30 ms: {last} us");
    assert!(trace.header.ready_us.unwrap() >= trace.span_us());

    let start = &status(&host, "data-v1")["start"];
    let reads = &start["first_reads"];
    let sum = ["hits", "late_hits", "misses"].map(|kind| reads[kind].as_u64().unwrap()).iter().sum::<u64>();
    assert_eq!((sum, reads["blocks"].as_u64().unwrap()), (7, 7), "{start}");
    assert!(reads["misses"].as_u64().unwrap() >= 1 && reads["stall_us"].as_u64().unwrap() > 0, "{start}");
    assert!(start["ready_us"].as_u64().unwrap() > 30_000, "{start}");
    assert_eq!(start["duplicates"], 0);
    assert!(start["bound"]["bound_us"].as_u64().is_some_and(|bound| bound > 30_000), "{start}");
    assert!(start["bound"]["ratio"].as_f64().is_some_and(|ratio| ratio >= 0.99), "{start}");
    host.end();
}

#[test]
fn the_second_start_on_a_host_follows_the_first() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_data();
    let command = ["--command", "serve", "--port", "80"];
    let mount = add(&host, &command);
    assert_eq!(status(&host, "data-v1")["start"]["recording"]["is_running"], true);
    let pages: Vec<u32> = (0..FILE_BLOCKS).step_by(70).rev().collect();
    read_pages(&mount.join("first"), &pages);
    host.ublkimg(&["rm", "data-v1"]).success();
    assert_eq!(kept(&host).len(), 1);

    // As a host that knows the trace and nothing else.
    host.ublkimg(&["daemon", "--stop"]).success();
    for directory in ["blobs", "metadata", "objects"] {
        std::fs::remove_dir_all(host.root.join("store").join(directory)).unwrap();
    }
    let mount = add(&host, &command);
    let start = status(&host, "data-v1")["start"].clone();
    assert_eq!(start["profile"]["source"], "recorded on this host", "{start}");
    wait_until("the order of the first run is fetched before anybody reads", || {
        status(&host, "data-v1")["start"]["prefetch_bytes"].as_u64().unwrap() >= 4 * 256 * 1024
    });
    std::thread::sleep(Duration::from_millis(300));
    read_pages(&mount.join("first"), &pages);
    let start = status(&host, "data-v1")["start"].clone();
    assert_eq!(start["first_reads"]["misses"], 0, "{start}");
    assert!(start["first_reads"]["hits"].as_u64().unwrap() > 0, "{start}");
    host.ublkimg(&["rm", "data-v1"]).success();

    add(&host, &["--command", "another"]);
    assert_eq!(status(&host, "data-v1")["start"]["profile"], Value::Null, "the trace is of another command");
    host.ublkimg(&["rm", "data-v1"]).success();
    add(&host, &[&["--profile", "none"][..], &command[..]].concat());
    assert_eq!(status(&host, "data-v1")["start"]["profile"], Value::Null);
    host.end();
}

/// The events of a file, those of one kind.
fn events(file: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event.get(kind).is_some()).collect()
}

#[test]
fn the_events_of_a_start_add_up_to_its_figures() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_data();
    let files = ["a.trace", "recorded", "followed", "start.svg"].map(|name| host.root.join(name));
    let [trace, recorded, followed, picture] = files.each_ref().map(|file| file.to_str().unwrap());
    let mount = add(&host, &["--no-record"]);
    host.ublkimg(&["record", "start", "data-v1", "--read-ahead-kb", "0"]).success();
    let pages: Vec<u32> = (0..FILE_BLOCKS).step_by(7).rev().collect();
    read_pages(&mount.join("first"), &pages);
    host.ublkimg(&["record", "stop", "data-v1", "-o", trace, "--events", recorded]).success();
    assert_eq!(events(&files[1], "read").len(), pages.len());
    host.ublkimg(&["rm", "data-v1"]).success();
    let reference = host.registry.reference("data", "v1");
    host.ublkimg(&["optimize", &reference, "--trace", trace, "--default"]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    std::fs::remove_dir_all(host.root.join("store")).unwrap();

    let mount = add(&host, &[]);
    read_pages(&mount.join("first"), &pages);
    // Nobody foretold these.
    read_pages(&mount.join("second"), &[300, 301]);
    let links = host.root.join("store/links.json");
    assert!(!links.exists());
    host.ublkimg(&["ready", "data-v1"]).success();
    assert!(std::fs::read_to_string(&links).unwrap().contains("round_trip"), "a killed server loses no estimate");
    let status = host.ublkimg(&["status", "--json", "data-v1", "--events", followed]).success().stdout;
    let status: Value = serde_json::from_str(&status).unwrap();
    let start = &status["start"];
    assert_eq!(start["profile"]["has_hot_blob"], true, "{start}");

    let sum = |events: &[&Value], of: &str| events.iter().map(|event| event[of].as_u64().unwrap()).sum::<u64>();
    let (reads, fetches) = (events(&files[2], "read"), events(&files[2], "fetch"));
    let all: Vec<&Value> = reads.iter().collect();
    let first_reads = &start["first_reads"];
    for (outcome, figure) in [("hit", "hits"), ("late-hit", "late_hits"), ("miss", "misses")] {
        let count = reads.iter().filter(|read| read["read"] == outcome).count();
        assert_eq!(first_reads[figure].as_u64().unwrap(), count as u64, "{outcome}: {start}");
    }
    assert!(first_reads["misses"].as_u64().unwrap() > 0, "{start}");
    assert_eq!(sum(&all, "blocks"), first_reads["blocks"]);
    assert_eq!(sum(&all, "stall_us"), first_reads["stall_us"]);
    assert_eq!(fetches.len() as u64, status["counters"]["registry_requests"]);
    let of_class = |wanted: &[&str]| -> Vec<&Value> {
        fetches.iter().filter(|fetch| wanted.contains(&fetch["fetch"].as_str().unwrap())).collect()
    };
    let ahead = of_class(&["trace", "read-ahead", "fill"]);
    let demand = of_class(&["demand"]);
    assert_eq!(ahead.len() as u64, start["prefetch_requests"]);
    assert_eq!(sum(&ahead, "bytes"), start["prefetch_bytes"]);
    assert_eq!(demand.len() as u64, start["demand_requests"]);
    assert_eq!(sum(&demand, "bytes"), start["demand_bytes"]);
    let marks = events(&files[2], "mark");
    let at = |name: &str| marks.iter().find(|mark| mark["mark"] == name).unwrap()["at_us"].as_u64().unwrap();
    assert!(at("profile") <= at("device") && at("manifest") <= at("device") && at("device") <= at("mount"));
    assert!(at("mount") <= at("ready") && at("ready").abs_diff(start["ready_us"].as_u64().unwrap()) < 1000);

    host.ublkimg(&["trace", "plot", followed, "-o", picture]).success();
    let picture = std::fs::read_to_string(&files[3]).unwrap();
    assert!(picture.contains(&format!(">hit: {}<", first_reads["hits"])), "{picture}");
    assert!(picture.contains(">ready<") && picture.contains(">by trace<"), "{picture}");
    host.end();
}

#[test]
fn a_killed_server_costs_the_end_of_a_recording() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_data();
    let mount = add(&host, &["--command", "serve"]);
    read_pages(&mount.join("first"), &[0, 100, 200]);
    wait_until("three first reads are in the log", || {
        status(&host, "data-v1")["start"]["recording"]["entries"].as_u64().unwrap() >= 3
    });
    host.kill_server();
    wait_until("the next server keeps what was recorded", || kept(&host).len() == 1);
    assert!(trace(&kept(&host)[0]).blocks() >= 3);
    if !Path::new("/dev/ublk-control").exists() {
        // A FUSE file goes with its server.
        for mount in leaks::mounts_below(host.root.path()).into_iter().rev() {
            rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }
    host.ublkimg(&["ls"]).success();
    host.end();
}

#[test]
fn a_full_image_needs_no_registry() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_data();
    let mount = add(&host, &["--wait", "full"]);
    let full = status(&host, "data-v1");
    assert_eq!(full["stored_bytes"], full["layer_bytes"], "{full}");
    assert_eq!(host.registry.stats().duplicate_bytes, 0);
    host.registry.set_fault("down", Fault::new("*", Toxic::Refuse));
    assert!(std::fs::read(mount.join("first")).unwrap() == noise(1, FILE_BLOCKS as usize * 4096));
    assert!(std::fs::read(mount.join("second")).unwrap() == noise(2, FILE_BLOCKS as usize * 4096));
    host.ublkimg(&["fill", "data-v1"]).success();
    host.ublkimg(&["fill", "data-v1", "--mode", "off"]).success();
    host.ublkimg(&["fill", "nothing"]).refused(3, &["nothing"]);
    host.end();
}

#[test]
fn one_run_of_an_image_is_recorded_and_leaves_nothing() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let reference = host.registry.reference("shell", "v1");
    let file = host.root.join("run.trace");
    let file_text = file.to_str().unwrap();
    let shell = ["/bin/sh", "-c", "cat /data | wc -c >&2; cat /data > /copy"];
    let recorded = host.ublkimg(&[&["record", &reference, "--json", "-o", file_text, "--"][..], &shell[..]].concat());
    let recorded = recorded.success();
    let report: Value = serde_json::from_str(&recorded.stdout).unwrap();
    assert!(report["ready_after_start_us"].as_u64().unwrap() > 0, "{report}");
    let trace = trace(&file);
    assert_eq!(trace.header.command, shell);
    assert!(trace.blocks() >= 256, "busybox and 1 MiB of data: {} blocks", trace.blocks());
    assert!(trace.header.ready_us.is_some());
    assert_eq!(host.devices(), Vec::<Value>::new());
    assert_eq!(leaks::mounts_below(host.root.path()), Vec::<PathBuf>::new());

    let failing = host.ublkimg(&["record", &reference, "-o", file_text, "--", "/bin/sh", "-c", "exit 7"]);
    failing.refused(2, &["7"]);
    let period = ["--period", "300ms", "-o", file_text, "--", "/bin/sleep", "60"];
    host.ublkimg(&[&["record", &reference][..], &period[..]].concat()).success();
    let never = ["--ready-cmd", "false", "--timeout", "1s", "-o", file_text, "--", "/bin/sleep", "60"];
    host.ublkimg(&[&["record", &reference][..], &never[..]].concat()).refused(7, &["not ready"]);
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn a_server_is_ready_when_it_answers() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let reference = host.registry.reference("shell", "v1");
    let files = ["run.trace", "run.events"].map(|name| host.root.join(name));
    let [trace_file, events_file] = files.each_ref().map(|file| file.to_str().unwrap());
    // Free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}/etc/passwd");
    let address = format!("127.0.0.1:{port}");
    let options = ["--ready-http", &url, "--events", events_file, "--json", "-o", trace_file, "--"];
    // It listens half a second after its start.
    let serve = format!("sleep 0.5; exec /bin/busybox httpd -f -p {address} -h /");
    let recorded = host.ublkimg(&[&["record", &reference][..], &options[..], &["/bin/sh", "-c", &serve]].concat());
    let report: Value = serde_json::from_str(&recorded.success().stdout).unwrap();
    assert!(report["ready_after_start_us"].as_u64().unwrap() > 500_000, "{report}");
    assert!(trace(&files[0]).header.ready_us.is_some());
    assert_eq!(events(&files[1], "mark").last().unwrap()["mark"], "ready");
    assert!(std::net::TcpStream::connect(&address).is_err(), "the server is gone with the run");

    // One that answers, but not well.
    let missing = format!("http://127.0.0.1:{port}/nothing/here");
    let options = ["--ready-http", &missing, "--timeout", "2s", "-o", trace_file, "--"];
    let serve = ["/bin/busybox", "httpd", "-f", "-p", &address, "-h", "/"];
    host.ublkimg(&[&["record", &reference][..], &options[..], &serve[..]].concat()).refused(7, &["not ready"]);
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let reference = host.registry.reference("shell", "v1");
    let file = host.root.join("run.trace");
    let seconds = (100_000 + std::process::id()).to_string();
    let mut record = Command::new(ublkimg_path())
        .env("UBLKIMG_ROOT", host.root.join("store"))
        .env("UBLKIMG_RUN_DIR", host.root.join("run"))
        .args(["record", &reference, "-o", file.to_str().unwrap(), "--", "/bin/sleep", &seconds])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its mounts are in another namespace, so only its command line tells that it is ours.
    let command = format!("/bin/sleep\0{seconds}\0");
    wait_until("the container runs", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
            .any(|line| line == command.as_bytes())
    });
    assert!(Command::new("kill").args(["-INT", &record.id().to_string()]).status().unwrap().success());
    let ended = record.wait().unwrap();
    let mut said = String::new();
    record.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(ended.code(), Some(130), "{said}");
    assert!(!file.exists());
    assert_eq!(host.devices(), Vec::<Value>::new());
    assert_eq!(leaks::mounts_below(host.root.path()), Vec::<PathBuf>::new());
    host.end();
}
