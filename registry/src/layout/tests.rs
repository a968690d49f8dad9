use std::io::Write as _;
use std::os::fd::AsRawFd as _;

use rustix::fs::{Mode, OFlags};

use super::*;
use crate::error::ErrorKind;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn layout(dir: &tempfile::TempDir, tag: Option<&str>) -> Layout {
    Layout::new(&dir.path().join("layout"), tag)
}

fn push(layout: &Layout, manifest: &str, tag: Option<&str>) -> Digest {
    layout.push_manifest(MANIFEST, &Bytes::copy_from_slice(manifest.as_bytes()), tag).unwrap()
}

#[test]
fn manifests_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let digest = push(&layout(&dir, None), "{}", Some("v1"));
    for tag in [None, Some("v1")] {
        let resolved = layout(&dir, tag).resolve().unwrap();
        assert_eq!(
            (resolved.digest, resolved.media_type.as_str(), &resolved.bytes[..]),
            (digest, MANIFEST, &b"{}"[..])
        );
    }
    let version = fs::read(dir.path().join("layout/oci-layout")).unwrap();
    assert_eq!(version, VERSION);
}

#[test]
fn a_tag_moves_and_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let old = push(&layout, "{\"a\":1}", Some("v1"));
    push(&layout, "{\"a\":1}", Some("v2"));
    let new = push(&layout, "{\"a\":2}", Some("v1"));
    let tagged = |tag| Layout { tag: Some(Arc::from(tag)), ..layout.clone() }.resolve().map(|resolved| resolved.digest);
    assert_eq!((tagged("v1").unwrap(), tagged("v2").unwrap()), (new, old));
    let error = tagged("v3").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().ends_with("has no tag v3 (tags: v2, v1)"), "{error}");
    let error = layout.resolve().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().ends_with("holds 2 manifests; name one as oci:DIR:TAG (tags: v2, v1)"), "{error}");
}

#[test]
fn an_index_takes_the_place_of_its_manifests() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let child = push(&layout, "{}", None);
    let index = format!(r#"{{"manifests":[{{"digest":"{child}"}}]}}"#);
    let index = layout.push_manifest(INDEX, &index.into(), None).unwrap();
    assert_eq!(layout.resolve().unwrap().digest, index);
    assert_eq!(&layout.manifest(&child).unwrap()[..], b"{}");
}

#[test]
fn foreign_fields_survive() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    layout.create().unwrap();
    let foreign = r#"{"schemaVersion":2,"x":[1],"manifests":[{"mediaType":"m","digest":"sha512:1","size":1,"platform":{"os":"o"}}]}"#;
    fs::write(layout.dir.join(INDEX_FILE), foreign).unwrap();
    push(&layout, "{}", Some("t"));
    let after: serde_json::Value = serde_json::from_slice(&fs::read(layout.dir.join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(after["x"], serde_json::json!([1]));
    assert_eq!(after["manifests"][0]["platform"]["os"], "o");
    assert_eq!(after["manifests"][1]["annotations"]["org.opencontainers.image.ref.name"], "t");
}

#[test]
fn blobs_are_verified_on_the_way_in() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let bytes = Bytes::from_static(b"0123456789");
    let digest = Digest::of(&bytes);
    for (claimed, size_bytes) in [(Digest::of(b"other"), 10), (digest, 9), (digest, 11)] {
        let error = layout.push_blob(&claimed, size_bytes, &BlobSource::Bytes(bytes.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    assert_eq!(fs::read_dir(layout.dir.join("blobs/sha256")).unwrap().count(), 0, "nothing half-made is left");

    let file = dir.path().join("source");
    fs::write(&file, &bytes).unwrap();
    assert_eq!(layout.push_blob(&digest, 10, &BlobSource::File(file)).unwrap(), Pushed::Uploaded);
    assert_eq!(layout.push_blob(&digest, 10, &BlobSource::Bytes(bytes)).unwrap(), Pushed::Existed);
    assert!(layout.has_blob(&digest));
    assert_eq!(&layout.blob_range(&digest, 3..7).unwrap()[..], b"3456");
    assert_eq!(layout.blob_range(&digest, 3..11).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(layout.blob_range(&Digest::of(b""), 0..1).unwrap_err().kind(), ErrorKind::NotFound);
    let error = layout.push_blob(&Digest::of(b""), 0, &BlobSource::File("/nonexistent/x".into())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().starts_with("reading /nonexistent/x: "), "{error}");
}

#[test]
fn a_file_without_a_name_gets_one_and_others_are_copied() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let bytes = b"0123456789";
    let (digest, place) = (Digest::of(bytes), layout.blob_path(&Digest::of(bytes)));
    let named = dir.path().join("named");
    fs::write(&named, bytes).unwrap();
    layout.push_blob(&digest, 10, &BlobSource::File(named.clone())).unwrap();
    assert_eq!(fs::metadata(&named).unwrap().nlink(), 1);
    fs::remove_file(&place).unwrap();

    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let Ok(unnamed) = rustix::fs::open(dir.path(), flags, Mode::from_raw_mode(0o666)) else {
        println!("SKIP: this file system has no files without names");
        return;
    };
    let mut file = File::from(unnamed);
    file.write_all(bytes).unwrap();
    let source = BlobSource::File(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
    assert_eq!(layout.push_blob(&digest, 10, &source).unwrap(), Pushed::Uploaded);
    assert_eq!(fs::metadata(&place).unwrap().ino(), file.metadata().unwrap().ino());
    assert_eq!(fs::read(&place).unwrap(), bytes);
    assert_eq!(layout.push_blob(&digest, 10, &source).unwrap(), Pushed::Existed);
    // A name that is taken by something else: it has one already, so it is copied and checked.
    fs::remove_file(&place).unwrap();
    fs::write(&place, b"half").unwrap();
    assert_eq!(layout.push_blob(&digest, 10, &source).unwrap(), Pushed::Uploaded);
    assert_eq!(fs::read(&place).unwrap(), bytes);
}

#[test]
fn a_changed_manifest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let digest = push(&layout, "{}", Some("t"));
    fs::write(layout.blob_path(&digest), "[]").unwrap();
    assert_eq!(layout.resolve().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn not_a_layout() {
    let dir = tempfile::tempdir().unwrap();
    let error = layout(&dir, None).resolve().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().ends_with("layout is not an OCI layout directory"), "{error}");
    fs::create_dir(dir.path().join("layout")).unwrap();
    fs::write(dir.path().join("layout/index.json"), "junk").unwrap();
    assert_eq!(layout(&dir, None).resolve().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn concurrent_pushes_lose_no_tag() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let layout = &layout;
            scope.spawn(move || push(layout, &format!("{{\"w\":{writer}}}"), Some(&format!("t{writer}"))));
        }
    });
    for writer in 0..8 {
        let tagged = Layout { tag: Some(format!("t{writer}").into()), ..layout.clone() };
        assert_eq!(tagged.resolve().unwrap().bytes, format!("{{\"w\":{writer}}}"));
    }
}

#[test]
fn what_refers_to_an_image_does_not_make_the_layout_ambiguous() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(&dir, None);
    let image = push(&layout, "{}", None);
    let referrer = |kind: &str| {
        let manifest = format!(
            r#"{{"mediaType":"{MANIFEST}","artifactType":"{kind}","subject":{{"mediaType":"{MANIFEST}","digest":"{image}","size":2}},"annotations":{{"k":"v"}}}}"#
        );
        push(&layout, &manifest, None)
    };
    let (profile, other) = (referrer("p"), referrer("o"));
    assert_eq!(layout.resolve().unwrap().digest, image);
    let listed = layout.referrers(&image, Some("p")).unwrap();
    assert_eq!(listed.iter().map(|entry| entry.digest).collect::<Vec<_>>(), [profile]);
    assert_eq!((listed[0].annotations["k"].as_str(), listed[0].media_type.as_str()), ("v", MANIFEST));
    assert_eq!(layout.referrers(&image, None).unwrap().len(), 2);
    assert_eq!(layout.referrers(&profile, None).unwrap(), []);
    // Listed by an index of the layout only, and a file that is gone.
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{profile}","size":1}}]}}"#);
    layout.push_manifest(INDEX, &index.into(), Some("t")).unwrap();
    fs::remove_file(layout.blob_path(&other)).unwrap();
    assert_eq!(layout.referrers(&image, None).unwrap().len(), 1);
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path(), Some("v1"));
    layout.push_manifest("m", &Bytes::from_static(b"{}"), Some("v1")).unwrap();
    let half = [dir.path().join(".ublkimg-1-0.tmp"), dir.path().join("blobs/sha256/.ublkimg-999999-7.tmp")];
    half.iter().for_each(|path| fs::write(path, "half").unwrap());
    // Killed when it had its name: it is the file that carries the lock.
    let whole = dir.path().join(".ublkimg-1-1.tmp");
    fs::hard_link(dir.path().join(VERSION_FILE), &whole).unwrap();
    let under_way = Temporary::create(dir.path()).unwrap();
    layout.push_manifest("m", &Bytes::from_static(b"{ }"), Some("v1")).unwrap();
    assert!(half.iter().chain([&whole]).all(|path| !path.exists()));
    assert!(dir.path().join(VERSION_FILE).exists());
    under_way.persist(&dir.path().join("done")).unwrap();
    assert!(dir.path().join("done").exists());
}
