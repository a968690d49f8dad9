//! Archives as sources: the same image has the same digest wherever it comes from.

use std::fs;

use serde_json::json;
use ublkimg_convert::ErrorKind;

use crate::same::fixture_file;
use crate::{fixture, run};

/// Two layers, uncompressed.
fn layers() -> [Vec<u8>; 2] {
    let first = [fixture_file("a/one", &fixture::noise(1, 50_000)), fixture_file("b", b"b"), vec![0; 1024]].concat();
    let second = [fixture_file("a/.wh.one", b""), fixture_file("c", b"c"), vec![0; 1024]].concat();
    [first, second]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oci_archive_is_the_layout_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    let layers = layers();
    let config = fixture::config(&layers.each_ref().map(|layer| fixture::sha256(layer)));
    let stored = layers.each_ref().map(|layer| (fixture::TAR_GZIP, fixture::gzip(layer)));
    fixture::push_layers(&format!("oci:{path}/source:v1"), &stored, &config).await;
    let plain = run(&format!("oci:{path}/source:v1"), &format!("oci:{path}/plain:v1")).await.unwrap();

    fixture::command("tar", &["-cf", "../source.tar", "."], &dir.path().join("source"));
    let source = format!("oci-archive:{path}/source.tar");
    let packed = run(&source, &format!("oci:{path}/packed:v1")).await.unwrap();
    assert_eq!(packed, plain);

    fixture::command("gzip", &["-k", "source.tar"], dir.path());
    let error = run(&format!("{source}.gz"), &format!("oci:{path}/packed:v1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);

    // A blob that was changed inside the archive.
    let mut bytes = fs::read(dir.path().join("source.tar")).unwrap();
    let blob = &stored[0].1;
    let at = bytes.windows(blob.len()).position(|window| window == blob.as_slice()).unwrap();
    bytes[at + blob.len() / 2] ^= 1;
    fs::write(dir.path().join("source.tar"), &bytes).unwrap();
    let error = run(&source, &format!("oci:{path}/packed:v2")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::VerificationFailed, "{error}");
    bytes.truncate(at + blob.len() / 2);
    fs::write(dir.path().join("source.tar"), &bytes).unwrap();
    let error = run(&source, &format!("oci:{path}/packed:v2")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadSource, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_docker_archive_with_a_linked_layer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    let [first, second] = layers();
    let saved = dir.path().join("saved");
    for (name, bytes) in [("1/layer.tar", &first), ("2/layer.tar", &second)] {
        fs::create_dir_all(saved.join(name).parent().unwrap()).unwrap();
        fs::write(saved.join(name), bytes).unwrap();
    }
    fs::create_dir(saved.join("3")).unwrap();
    std::os::unix::fs::symlink("../1/layer.tar", saved.join("3/layer.tar")).unwrap();
    let diff_ids = [&first, &second, &first].map(|layer| fixture::sha256(layer));
    fs::write(saved.join("config.json"), fixture::config(&diff_ids)).unwrap();
    let images =
        |names: [&str; 3]| json!([{ "Config": "config.json", "RepoTags": ["a:1"], "Layers": names }]).to_string();
    fs::write(saved.join("manifest.json"), images(["1/layer.tar", "2/layer.tar", "3/layer.tar"])).unwrap();
    fixture::command("tar", &["-cf", "../saved.tar", "."], &saved);

    let source = format!("docker-archive:{path}/saved.tar");
    let summary = run(&source, &format!("oci:{path}/converted:v1")).await.unwrap();
    assert_eq!(summary.images[0].layers.len(), 3);
    assert_eq!(summary.images[0].layers[0].digest, summary.images[0].layers[2].digest);

    // The layers in the wrong order do not have the digests of the config.
    fs::write(saved.join("manifest.json"), images(["2/layer.tar", "1/layer.tar", "3/layer.tar"])).unwrap();
    fixture::command("tar", &["-cf", "../saved.tar", "."], &saved);
    let error = run(&source, &format!("oci:{path}/converted:v2")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::VerificationFailed, "{error}");
}
