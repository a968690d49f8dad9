//! The daemon behind the commands: started once, stopped when nothing needs it, killed, and what refuses to go.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use ublkimg_tests::command::ublkimg;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::leaks;
use ublkimg_tests::registry::{Auth, Credentials, Fault, Toxic};
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::skip;
use ublkimg_tests::temp_root::TempRoot;

/// The processes of a host's daemon whose command line has `word`.
fn processes(host: &Host, word: &str) -> Vec<u32> {
    let all = leaks::processes_of(host.root.path());
    let named = all.iter().filter(|process| process.contains(" daemon ") && process.contains(word));
    named.map(|process| process.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn many_adds_at_once_start_one_daemon() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let printed: BTreeSet<String> = std::thread::scope(|scope| {
        let adds: Vec<_> = (0..8).map(|_| scope.spawn(|| host.add("sample", &[]).success().stdout)).collect();
        adds.into_iter().map(|add| add.join().unwrap()).collect()
    });
    assert_eq!(printed.len(), 1, "all print the same device: {printed:?}");
    let names: Vec<String> = (0..4).map(|number| format!("name-{number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| host.add("sample", &["--name", name]).success());
        }
    });
    assert_eq!(host.devices().len(), 5);
    assert_eq!(processes(&host, "--server").len(), 1);
    assert_eq!(host.registry.stats().duplicate_bytes, 0, "the metadata too is fetched once");
    host.end();
}

#[test]
fn nothing_to_list_and_nothing_to_stop() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Anonymous);
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.ublkimg(&["daemon", "--stop"]).success();
    assert!(processes(&host, "").is_empty(), "listing and stopping start no daemon");
    let report = host.ublkimg(&["doctor", "--json"]).success();
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert!(report["checks"].as_array().is_some_and(|checks| !checks.is_empty()), "{report}");
    host.end();
}

#[test]
fn a_device_in_use_stays() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let dir_text = dir.to_str().unwrap();
    host.ublkimg(&["daemon", "--stop"]).refused(9, &[]);

    let open = std::fs::File::open(dir.join("etc/replaced")).unwrap();
    let fault = FaultRow::begins("a device that is still in use is removed");
    host.ublkimg(&["rm", dir_text]).refused(9, &[dir_text]);
    fault.ends("refused with exit code 9; it stays as it was");
    assert_eq!(std::fs::read(dir.join("etc/added")).unwrap(), b"added\n", "a refused removal changes nothing");
    drop(open);

    let elsewhere = TempRoot::new().unwrap();
    let scratch = elsewhere.tmpfs("scratch", 1 << 20).unwrap();
    let [upper, work, root] = ["upper", "work", "root"].map(|name| elsewhere.dir(scratch.join(name)).unwrap());
    let options = format!("lowerdir={dir_text},upperdir={},workdir={}", upper.display(), work.display());
    let options = std::ffi::CString::new(options).unwrap();
    match mount("overlay", &root, "overlay", MountFlags::empty(), Some(options.as_c_str())) {
        Ok(()) => {
            std::fs::write(root.join("etc/added"), "changed").unwrap();
            let refused = host.ublkimg(&["rm", dir_text]);
            assert_eq!(std::fs::read(root.join("etc/replaced")).unwrap(), b"new\n", "the container goes on");
            unmount(&root, UnmountFlags::empty()).unwrap();
            refused.refused(9, &[]);
        }
        Err(error) => println!("no overlayfs here: {error}"),
    }
    host.ublkimg(&["rm", dir_text]).success();
    host.end();
}

#[test]
fn force_removes_what_is_in_use() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let open = std::fs::File::open(dir.join("data/noise")).unwrap();
    let removed = host.ublkimg(&["rm", "--force", dir.to_str().unwrap()]).success();
    assert!(removed.elapsed < Duration::from_secs(15), "{:?}", removed.elapsed);
    assert_eq!(host.devices(), Vec::<Value>::new());
    let mut buffer = [0; 4096];
    let read = std::os::unix::fs::FileExt::read_at(&open, &mut buffer, 1 << 20);
    assert!(read.is_err(), "a reader gets an error, and does not hang: {read:?}");
    drop(open);
    host.end();
}

#[test]
fn a_killed_server_comes_back() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    host.mounted("sample");
    let [server] = processes(&host, "--server")[..] else { panic!("{:?}", leaks::processes_of(host.root.path())) };
    assert!(Command::new("kill").args(["-9", &server.to_string()]).status().unwrap().success());
    let deadline = Instant::now() + Duration::from_secs(20);
    let comes_back = || processes(&host, "--server").iter().any(|process| *process != server);
    while !comes_back() {
        assert!(Instant::now() < deadline, "the guard starts no server: {:?}", leaks::processes_of(host.root.path()));
        std::thread::sleep(Duration::from_millis(20));
    }
    host.ublkimg(&["ls", "--json"]).success();
    if Path::new("/dev/ublk-control").exists() {
        let mount = host.root.join("mnt-sample");
        assert_eq!(std::fs::read(mount.join("etc/added")).unwrap(), b"added\n", "recovered");
        assert_eq!(host.devices().len(), 1);
        host.end();
        return;
    }
    // A FUSE file goes with its server; the mount that stood on it can be taken away, and the image added again.
    for device in host.devices() {
        host.ublkimg(&["rm", "--force", device["name"].as_str().unwrap()]).success();
    }
    for mount in leaks::mounts_below(host.root.path()).into_iter().rev() {
        unmount(&mount, UnmountFlags::DETACH).unwrap();
    }
    let dir = host.mounted("sample");
    assert_eq!(std::fs::read(dir.join("etc/added")).unwrap(), b"added\n");
    host.end();
}

#[test]
fn logs_are_json_where_that_is_wanted() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let mount = host.root.join("mnt");
    let log = ["--log", "ublkimg_driver=debug,warn", "--log-format", "json"];
    host.add("sample", &[&["--mount", mount.to_str().unwrap()][..], &log].concat()).success();
    std::fs::read(mount.join("data/prose")).unwrap();
    host.ublkimg(&["rm", "sample-v1"]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    let lines: Vec<serde_json::Value> =
        host.log().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    assert!(!lines.is_empty());
    for line in &lines {
        for field in ["timestamp", "level", "message"] {
            assert!(line[field].is_string(), "{field}: {line}");
        }
    }
    host.end();
}

/// The daemon of the unit has no HOME, and knows nothing of who calls it.
#[test]
fn credentials_are_those_of_the_caller() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Basic(Credentials::new("user", "right")));
    SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
    host.convert("source", "sample");
    let mut daemon = host.daemon_under(&["env", "-u", "HOME"]);
    host.add("sample", &[]).refused(4, &["wants credentials", "docker login"]);
    let docker = host.root.join("docker");
    std::fs::create_dir(&docker).unwrap();
    let log_in = |basic: &str| {
        let auths = format!(r#"{{"auths": {{"{}": {{"auth": "{basic}"}}}}}}"#, host.registry.addr());
        std::fs::write(docker.join("config.json"), auths).unwrap();
    };
    let mount = host.root.join("mnt-sample");
    let add = || {
        let words = ["add", &host.registry.reference("sample", "v1"), "--mount", mount.to_str().unwrap()];
        ublkimg(host.root.path()).env("DOCKER_CONFIG", &docker).args(words).run()
    };
    log_in("dXNlcjp3cm9uZw==");
    add().refused(4, &["were refused"]);
    log_in("dXNlcjpyaWdodA==");
    add().success();
    assert_eq!(std::fs::read(mount.join("etc/added")).unwrap(), b"added\n");
    if Path::new("/dev/ublk-control").exists() {
        // The next server has it from the record.
        let [server] = processes(&host, "--server")[..] else { panic!("{:?}", leaks::processes_of(host.root.path())) };
        host.kill_server();
        host::wait_until("another server", || processes(&host, "--server").iter().any(|process| *process != server));
        host.registry.reset_stats();
        assert_eq!(std::fs::read(mount.join("data/noise")).unwrap().len(), 2 * 1024 * 1024 + 17);
        assert!(host.registry.stats().requests.contains_key("blob_get"), "{:?}", host.registry.stats().requests);
    }
    host.end();
    daemon.wait().unwrap();
}

#[test]
fn a_takeover_over_fuse_is_refused_and_nothing_changes() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        skip!("this kernel has no FUSE or no loop devices");
    }
    let host = Host::with_sample();
    let mount = host.root.join("mnt");
    host.add("sample", &["--transport", "fuse", "--mount", mount.to_str().unwrap()]).success();
    let before = (processes(&host, ""), host.devices());
    host.ublkimg(&["daemon", "--takeover"]).refused(2, &["the old one serves on"]);
    assert!(host.log().contains("sample-v1 is served over FUSE"), "{}", host.log());
    assert_eq!(processes(&host, ""), before.0, "the same guard and server");
    assert_eq!(host.devices().len(), 1);
    assert_eq!(host.devices()[0]["device"], before.1[0]["device"]);
    assert_eq!(std::fs::read(mount.join("etc/added")).unwrap(), b"added\n");
    host.add("sample", &["--name", "another", "--transport", "fuse"]).success();
    host.end();
}

/// Numbers of the ublk devices that can be read.
fn block_devices() -> BTreeSet<u32> {
    let entries = std::fs::read_dir("/sys/block").unwrap();
    let number = |name: &str| name.strip_prefix("ublkb").and_then(|number| number.parse().ok());
    entries.filter_map(|entry| number(entry.unwrap().file_name().to_str().unwrap())).collect()
}

#[test]
fn no_device_can_be_read_before_its_record_is_written() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Path::new("/dev/ublk-control").exists() {
        skip!("this kernel has no ublk");
    }
    let host = Host::with_sample();
    host.add("sample", &[]).success();
    host.ublkimg(&["rm", "sample-v1"]).success();
    let (records, away) = (host.root.join("store/devices"), host.root.join("away"));
    std::fs::rename(&records, &away).unwrap();
    let (others, over) = (block_devices(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                assert_eq!(block_devices(), others, "a device that no server would know of");
            }
        });
        for _ in 0..3 {
            host.add("sample", &[]).refused(12, &["devices"]);
        }
        over.store(true, Ordering::SeqCst);
        watching.join().unwrap();
    });
    std::fs::rename(&away, &records).unwrap();
    host.add("sample", &[]).success();
    assert!(records.join("sample-v1.json").exists());
    host.end();
}

#[test]
fn a_configuration_that_broke_costs_no_read_of_what_is_stored() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Path::new("/dev/ublk-control").exists() {
        skip!("this kernel has no ublk: nothing survives a killed server");
    }
    let host = Host::with_sample();
    let reference = host.registry.reference("sample", "v1");
    let of_registry = host.root.join("certs.d").join(reference.split('/').next().unwrap());
    std::fs::create_dir_all(&of_registry).unwrap();
    let hosts = of_registry.join("hosts.toml");
    let mount = host.root.join("mnt");
    host.add("sample", &["--mount", mount.to_str().unwrap()]).success();
    assert_eq!(std::fs::read(mount.join("etc/added")).unwrap(), b"added\n");
    std::fs::write(&hosts, "this is no TOML").unwrap();
    let [server] = processes(&host, "--server")[..] else { panic!("{:?}", leaks::processes_of(host.root.path())) };
    host.kill_server();
    host::wait_until("another server", || processes(&host, "--server").iter().any(|process| *process != server));
    host::wait_until("its device", || host.devices().len() == 1);
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let fault = FaultRow::begins("`hosts.toml` is unusable when a server comes back");
    assert_eq!(std::fs::read(mount.join("etc/added")).unwrap(), b"added\n", "it is stored");
    // What is not stored waits, and status says for what; once the file is mended the read goes on.
    let reading = std::thread::spawn({
        let noise = mount.join("data/noise");
        move || std::fs::read(noise)
    });
    let status = || host.ublkimg(&["status", "sample-v1"]).success().stdout;
    host::wait_until("a read that waits for its configuration", || status().contains("hosts.toml"));
    std::fs::remove_file(&hosts).unwrap();
    assert!(!reading.join().unwrap().unwrap().is_empty());
    fault.ends("what is stored is read; the rest waits until it is mended: data");
    host.end();
}

#[test]
fn a_fill_outlasts_its_server() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Path::new("/dev/ublk-control").exists() {
        skip!("this kernel has no ublk: nothing survives a killed server");
    }
    let host = Host::with_sample();
    host.add("sample", &[]).success();
    host.registry.set_fault("hangs", Fault::new("*/blobs/*", Toxic::Hang));
    host.ublkimg(&["fill", "sample-v1", "--mode", "idle"]).success();
    let [server] = processes(&host, "--server")[..] else { panic!("{:?}", leaks::processes_of(host.root.path())) };
    host.kill_server();
    host::wait_until("another server", || processes(&host, "--server").iter().any(|process| *process != server));
    host::wait_until("its device", || host.devices().len() == 1);
    host.registry.clear_fault("hangs");
    host::wait_until("all of it in the store", || {
        let status = host.ublkimg(&["status", "sample-v1", "--json"]).success();
        let status: Value = serde_json::from_str(&status.stdout).unwrap();
        status["stored_bytes"] == status["layer_bytes"]
    });
    host.end();
}
