//! What a bad source, a bad disk and a bad request lead to.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ublkimg_convert::{Error, ErrorKind, Options, Progress, Task, convert};

use crate::same::fixture_file;
use crate::{fixture, run, run_with};

/// Converts an image of one layer with these bytes and diff id; it must fail and leave nothing under the tag.
async fn failure(stored: Vec<u8>, diff_id: &str) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let source = format!("oci:{}/source:v1", dir.path().display());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    fixture::push_layers(&source, &[(fixture::TAR_GZIP, stored)], &fixture::config(&[diff_id.to_owned()])).await;
    let tmpdir = dir.path().join("tmp");
    fs::create_dir(&tmpdir).unwrap();
    let options = Options { tmpdir: tmpdir.clone(), ..Options::default() };
    let error = run_with(&source, &destination, &options).await.unwrap_err();
    assert_eq!(fs::read_dir(&tmpdir).unwrap().count(), 0, "temporary files are left behind");
    let left = crate::repository(&destination).await.resolve().await;
    assert_eq!(left.unwrap_err().kind(), ublkimg_registry::ErrorKind::NotFound);
    error
}

fn good_tar() -> Vec<u8> {
    [fixture_file("a", &fixture::noise(1, 100_000)), vec![0; 1024]].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_layer_is_named() {
    let mut stored = fixture::gzip(&good_tar());
    stored.truncate(stored.len() / 2);
    let error = failure(stored.clone(), &fixture::sha256(&good_tar())).await;
    assert_eq!(error.kind(), ErrorKind::BadSource);
    let text = error.to_string();
    assert!(text.contains(&fixture::sha256(&stored)) && text.contains("truncated"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_diff_id_fails_verification() {
    let error = failure(fixture::gzip(&good_tar()), &fixture::sha256(b"something else")).await;
    assert_eq!(error.kind(), ErrorKind::VerificationFailed);
    assert!(error.to_string().contains("config"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_leads_out_is_named() {
    let tar = [fixture_file("../evil", b"x"), vec![0; 1024]].concat();
    let error = failure(fixture::gzip(&tar), &fixture::sha256(&tar)).await;
    assert_eq!(error.kind(), ErrorKind::BadSource);
    assert!(error.to_string().contains("../evil"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_blob_fails_verification() {
    let dir = tempfile::tempdir().unwrap();
    let source = format!("oci:{}/source:v1", dir.path().display());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let stored = fixture::gzip(&good_tar());
    let config = fixture::config(&[fixture::sha256(&good_tar())]);
    fixture::push_layers(&source, &[(fixture::TAR_GZIP, stored.clone())], &config).await;
    let hex = fixture::sha256(&stored).replace("sha256:", "");
    let path = dir.path().join("source/blobs/sha256").join(hex);
    for position in [20, stored.len() / 2, stored.len() - 1] {
        let mut damaged = stored.clone();
        damaged[position] ^= 0x55;
        fs::write(&path, damaged).unwrap();
        let error = run(&source, &destination).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::VerificationFailed, "byte {position}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_things_are_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let path = dir.path().display();
    for source in [
        format!("oci:{path}/nothing:v1"),
        format!("oci-archive:{path}/nothing.tar"),
        format!("docker-archive:{path}/nothing.tar"),
        format!("dir:{path}/nothing"),
    ] {
        let error = run(&source, &destination).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{source}: {error}");
        assert!(error.to_string().contains("nothing"), "{error}");
    }
    let options = Options { tmpdir: dir.path().join("no-tmp"), ..Options::default() };
    fs::create_dir(dir.path().join("empty")).unwrap();
    let error = run_with(&format!("dir:{path}/empty"), &destination, &options).await.unwrap_err();
    assert!(error.to_string().contains("no-tmp"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_converted_image_is_not_converted_again() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    let first = format!("oci:{}/first", dir.path().display());
    let second = format!("oci:{}/second:v1", dir.path().display());
    run(&format!("dir:{}/root", dir.path().display()), &first).await.unwrap();
    let error = run(&first, &second).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_to_be_full() {
    if !fixture::is_root() {
        println!("SKIP: needs root to mount a small tmpfs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), fixture::noise(3, 4 << 20)).unwrap();
    fixture::command("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", small.to_str().unwrap()], dir.path());
    let options = Options { tmpdir: small.clone(), ..Options::default() };
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let result = run_with(&format!("dir:{}", root.display()), &destination, &options).await;
    let left = fs::read_dir(&small).unwrap().count();
    fixture::command("umount", &[small.to_str().unwrap()], dir.path());
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DiskFull, "{error}");
    assert!(error.to_string().contains("small"), "{error}");
    assert_eq!(left, 0);
}

/// Counts bytes and says when there are some.
#[derive(Default)]
struct Counter {
    bytes: AtomicU64,
    started: tokio::sync::Notify,
}

impl Progress for Counter {
    fn start(&self, _: &Task, _: Option<u64>) {}
    fn advance(&self, _: &Task, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.started.notify_one();
    }
    fn finish(&self, _: &Task) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_that_is_given_up_stops() {
    const SIZE: usize = 128 << 20;
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("root/file"), vec![7; SIZE]).unwrap();
    let source = format!("dir:{}/root", dir.path().display()).parse().unwrap();
    let destination = format!("oci:{}/converted:v1", dir.path().display()).parse().unwrap();
    let counter = Arc::new(Counter::default());
    let options = Options::default();
    tokio::select! {
        result = convert(&source, &destination, &options, Arc::<Counter>::clone(&counter)) => panic!("{result:?}"),
        () = counter.started.notified() => {}
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(counter.bytes.load(Ordering::Relaxed) < SIZE as u64, "work went on");
}
