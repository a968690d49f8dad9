//! Images that a host is to have, as services bring them up at boot.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::{Fault, Toxic};
use ublkimg_tests::skip;

#[test]
fn images_of_files_come_up_without_their_registry_and_a_bad_one_holds_up_nothing() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let (images, mount) = (host.root.join("images.d"), host.root.join("mnt"));
    std::fs::create_dir(&images).unwrap();
    let put = |name: &str, text: &str| std::fs::write(images.join(name), text).unwrap();
    let reference = host.registry.reference("sample", "v1");
    put("b.toml", &format!("reference = '{reference}'\nmount = '{}'\nio-timeout = '2s'\n", mount.display()));
    let directory = images.display().to_string();
    let up = |more: &[&str]| host.ublkimg(&[&["up", "--images-dir", &directory], more].concat());

    let shown = up(&["--dry-run"]).success().stdout;
    assert_eq!(shown, format!("ublkimg add --name=b --mount={} --io-timeout=2s -- {reference}\n", mount.display()));
    assert!(!mount.exists());

    host.ublkimg(&["pull", &reference]).success();
    host.registry.set_fault("away", Fault::new("*", Toxic::Refuse));
    put("a.toml", "reference = 'r/x'\nmonut = '/x'\n");
    let some = up(&[]);
    assert_eq!(some.code, Some(2), "{}", some.stderr);
    assert!(some.stderr.contains("--monut") && some.stderr.contains("a.toml"), "{}", some.stderr);
    assert_eq!(host.devices()[0]["name"], "b");
    assert!(std::fs::read_dir(&mount).unwrap().next().is_some());
    // Again, and one alone.
    up(&["b"]).success();
    up(&["c"]).refused(3, &["c.toml"]);
    host.ublkimg(&["rm", "b"]).success();
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}
