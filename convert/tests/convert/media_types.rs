//! What manifests say of layers and what they are.

use std::net::TcpListener;

use serde_json::json;
use ublkimg_convert::ErrorKind;

use crate::same::fixture_file;
use crate::{fixture, run};

const FOREIGN_GZIP: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";

fn tar(name: &str) -> Vec<u8> {
    [fixture_file(name, &fixture::noise(1, 50_000)), vec![0; 1024]].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_read_by_its_magic_whatever_its_type_says() {
    let dir = tempfile::tempdir().unwrap();
    let tars = ["a", "b", "c"].map(tar);
    let stored = [tars[0].clone(), fixture::gzip(&tars[1]), zstd::encode_all(&tars[2][..], 1).unwrap()];
    let config = fixture::config(&tars.each_ref().map(|tar| fixture::sha256(tar)));
    let mut made = Vec::new();
    for (tag, types) in [
        ("right", [fixture::TAR, fixture::TAR_GZIP, fixture::TAR_ZSTD]),
        ("wrong", [fixture::TAR_ZSTD, FOREIGN_GZIP, fixture::TAR_GZIP]),
    ] {
        let source = format!("oci:{}/source:{tag}", dir.path().display());
        let layers: Vec<_> = types.into_iter().zip(stored.iter().cloned()).collect();
        fixture::push_layers(&source, &layers, &config).await;
        let summary = run(&source, &format!("oci:{}/converted:{tag}", dir.path().display())).await.unwrap();
        made.push(summary.images[0].layers.iter().map(|layer| layer.digest).collect::<Vec<_>>());
    }
    assert_eq!(made[0], made[1]);
}

/// Who is asked for a layer is the registry, with its credentials (CVE-2020-15157).
#[tokio::test(flavor = "multi_thread")]
async fn places_outside_of_the_registry_are_never_asked() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let stored = fixture::gzip(&tar("a"));
    let digest = fixture::sha256(&stored);
    let layer = json!({
        "mediaType": FOREIGN_GZIP,
        "digest": digest,
        "size": stored.len(),
        "urls": [format!("http://{}/layer", elsewhere.local_addr().unwrap())],
    });
    let source = format!("oci:{}/source:v1", dir.path().display());
    fixture::push_manifest(&source, &[layer], &fixture::config(&[fixture::sha256(&tar("a"))])).await;
    let error = run(&source, &format!("oci:{}/converted:v1", dir.path().display())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains(&digest), "{error}");
    assert_eq!(elsewhere.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}
