//! A registry whose name is not found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::{Fault, Toxic};
use ublkimg_tests::skip;

/// Reserved (RFC 6761): no name server knows it, and nobody is asked here.
const NAME: &str = "registry.invalid";

/// Runs the words after the first two with those files as /etc/hosts and /etc/nsswitch.conf.
const WITH_NAMES: &str =
    r#"mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/nsswitch.conf && shift && exec "$@""#;

#[test]
fn a_registry_whose_name_does_not_resolve() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Path::new("/etc/nsswitch.conf").exists() || !Path::new("/etc/hosts").exists() {
        skip!("no /etc/nsswitch.conf or no /etc/hosts to mount others over");
    }
    if Command::new("unshare").arg("--version").stdout(Stdio::null()).status().is_err() {
        skip!("there is no unshare");
    }
    let host = Host::with_sample();
    let hosts = host.root.join("hosts");
    // The file is changed and not replaced, since it is mounted.
    let resolves = |yes: bool| std::fs::write(&hosts, if yes { format!("127.0.0.1 {NAME}\n") } else { String::new() });
    resolves(false).unwrap();
    let sources = host.root.file("nsswitch.conf", "hosts: files\n").unwrap();
    let [hosts, sources] = [&hosts, &sources].map(|path| path.to_str().unwrap());
    let mut daemon =
        host.daemon_under(&["unshare", "--mount", "--propagation", "private", "sh", "-c", WITH_NAMES, hosts, sources]);

    let reference = format!("{NAME}:{}/sample:v1", host.registry.addr().port());
    let mount = host.root.join("mnt");
    let add = |more: &[&str]| {
        let add = ["add", &reference, "--name", "sample", "--plain-http", "--mount", mount.to_str().unwrap()];
        host.ublkimg(&[&add[..], more].concat())
    };
    let fault = FaultRow::begins("DNS failure while an image is added with `--timeout 2s`");
    add(&["--timeout", "2s"]).refused(7, &[NAME, "lookup"]);
    fault.ends("waited for, then exit code 7");
    assert_eq!(host.registry.stats().connections, 0);

    resolves(true).unwrap();
    add(&["--fill", "off", "--io-timeout", "5s"]).success();
    // Connections that are open need no name.
    let lose = || {
        resolves(false).unwrap();
        host.registry.set_fault("lose", Fault::new("*", Toxic::Refuse));
        std::thread::sleep(Duration::from_millis(100));
        host.registry.clear_fault("lose");
    };
    lose();
    let before = host.registry.stats().connections;
    let fault = FaultRow::begins("DNS failure for 1 s");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| std::fs::read(mount.join("etc/added")));
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            assert!(!reader.is_finished(), "the reader does not wait");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(host.registry.stats().connections, before, "it is not reached");
        resolves(true).unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), b"added\n");
    });
    fault.ends("data");

    lose();
    let fault = FaultRow::begins("DNS failure beyond `--io-timeout` (5 s)");
    let error = std::fs::read(mount.join("data/noise")).unwrap_err();
    fault.ends("EIO; the next read tries afresh");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    resolves(true).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(std::fs::read(mount.join("data/noise")).unwrap().len(), 2 * 1024 * 1024 + 17);
    host.end();
    daemon.wait().unwrap();
}
