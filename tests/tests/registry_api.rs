//! The test registry speaks the distribution API, as a client without any of our code sees it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ublkimg_image::Sha256;
use ublkimg_tests::http::Connection;
use ublkimg_tests::registry::{Auth, Config, Credentials, TestRegistry};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn registry() -> TestRegistry {
    TestRegistry::start(Config::default()).unwrap()
}

fn connect(registry: &TestRegistry) -> Connection {
    Connection::open(registry.addr()).unwrap()
}

fn manifest_of(digest: Sha256, size_bytes: usize) -> String {
    let descriptor =
        serde_json::json!({"mediaType": "application/octet-stream", "digest": digest.to_string(), "size": size_bytes});
    serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor, "layers": []}).to_string()
}

#[test]
fn blobs_are_served_whole_and_in_ranges() {
    let registry = registry();
    let bytes: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    let digest = registry.put_blob("a/b", bytes.clone()).unwrap();
    let path = format!("/v2/a/b/blobs/{digest}");
    let mut client = connect(&registry);

    let whole = client.get(&path).unwrap();
    assert_eq!((whole.status, whole.body == bytes), (200, true));
    assert_eq!(whole.header("docker-content-digest"), Some(digest.to_string().as_str()));

    let part = client.request("GET", &path, &[("Range", "bytes=300000-699999")], &[]).unwrap();
    assert_eq!((part.status, part.body == bytes[300_000..700_000]), (206, true));
    assert_eq!(part.header("content-range"), Some("bytes 300000-699999/1000000"));

    let past = client.request("GET", &path, &[("Range", "bytes=1000000-1000001")], &[]).unwrap();
    assert_eq!((past.status, past.header("content-range")), (416, Some("bytes */1000000")));

    let head = client.request("HEAD", &path, &[], &[]).unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, Some("1000000")));

    assert_eq!(client.get(&format!("/v2/other/blobs/{digest}")).unwrap().status, 404, "not through this repository");
    assert_eq!(client.get("/v2/a/b/blobs/sha256:00").unwrap().status, 400);
    assert_eq!(client.get("/v2/").unwrap().status, 200);

    let stats = registry.stats();
    let blob = &stats.blobs[&digest.to_string()];
    assert_eq!(blob.ranges, [0..1_000_000, 300_000..700_000]);
    assert_eq!((blob.bytes_sent, blob.duplicate_bytes, stats.duplicate_bytes), (1_400_000, 400_000, 400_000));
    assert_eq!((stats.requests_of("blob_get"), stats.requests_of("blob_head"), stats.connections), (5, 1, 1));
    assert_eq!((stats.statuses[&206], stats.statuses[&416], stats.max_concurrent_requests), (1, 1, 1));
    registry.reset_stats();
    assert_eq!(registry.stats().bytes_sent, 0);
}

#[test]
fn pushes_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    for store_dir in [None, Some(dir.path().to_owned())] {
        let registry = TestRegistry::start(Config { store_dir: store_dir.clone(), ..Config::default() }).unwrap();
        let mut client = connect(&registry);
        let blob = b"some bytes of a blob".as_slice();
        let digest = Sha256::of(blob);

        let at_once = client.request("POST", &format!("/v2/one/blobs/uploads/?digest={digest}"), &[], blob).unwrap();
        assert_eq!(at_once.status, 201);

        let begun = client.request("POST", "/v2/two/blobs/uploads/", &[], &[]).unwrap();
        assert_eq!(begun.status, 202);
        let upload = begun.header("location").unwrap().to_owned();
        let wrong = client.request("PUT", &format!("{upload}?digest={}", Sha256::of(b"")), &[], blob).unwrap();
        assert_eq!(wrong.status, 400);

        let begun = client.request("POST", "/v2/two/blobs/uploads/", &[], &[]).unwrap();
        let upload = begun.header("location").unwrap().to_owned();
        let first = client.request("PATCH", &upload, &[("Content-Range", "0-4")], &blob[..5]).unwrap();
        assert_eq!((first.status, first.header("range")), (202, Some("0-4")));
        let gap = client.request("PATCH", &upload, &[("Content-Range", "9-19")], &blob[9..]).unwrap();
        assert_eq!(gap.status, 416);
        let second = client.request("PATCH", &upload, &[("Content-Range", "5-19")], &blob[5..]).unwrap();
        assert_eq!(second.status, 202);
        assert_eq!(client.request("PUT", &format!("{upload}?digest={digest}"), &[], &[]).unwrap().status, 201);

        let mount = |from: &str| format!("/v2/three/blobs/uploads/?mount={digest}&from={from}");
        let begun = client.request("POST", &mount("nowhere"), &[], &[]).unwrap();
        assert_eq!(begun.status, 202);
        assert_eq!(client.request("DELETE", begun.header("location").unwrap(), &[], &[]).unwrap().status, 204);
        assert_eq!(client.request("POST", &mount("two"), &[], &[]).unwrap().status, 201);

        let manifest = manifest_of(digest, blob.len());
        let headers = [("Content-Type", MANIFEST)];
        let put =
            |client: &mut Connection, path: &str| client.request("PUT", path, &headers, manifest.as_bytes()).unwrap();
        assert_eq!(put(&mut client, "/v2/empty/manifests/v1").status, 404, "the config is not there");
        assert_eq!(put(&mut client, &format!("/v2/three/manifests/{digest}")).status, 400, "another digest");
        assert_eq!(put(&mut client, "/v2/three/manifests/v1").status, 201);

        let by_tag = client.get("/v2/three/manifests/v1").unwrap();
        assert_eq!((by_tag.header("content-type"), by_tag.body.as_slice()), (Some(MANIFEST), manifest.as_bytes()));
        let by_digest = client.get(&format!("/v2/three/manifests/{}", Sha256::of(manifest.as_bytes()))).unwrap();
        assert_eq!(by_digest.body, manifest.as_bytes());
        let tags = client.get("/v2/three/tags/list").unwrap();
        assert_eq!(tags.body, br#"{"name":"three","tags":["v1"]}"#);
        assert_eq!(client.get("/v2/three/manifests/v2").unwrap().status, 404);
    }
    let again = TestRegistry::start(Config { store_dir: Some(dir.path().to_owned()), ..Config::default() }).unwrap();
    assert_eq!(connect(&again).get("/v2/three/manifests/v1").unwrap().status, 200, "kept in the directory");
    assert!(std::fs::read_dir(dir.path()).unwrap().all(|entry| {
        let name = entry.unwrap().file_name();
        !name.to_string_lossy().starts_with("upload-")
    }));
}

#[test]
fn referrers_are_found_by_subject() {
    let registry = registry();
    let subject = registry.put_manifest("r", MANIFEST, manifest_of(Sha256::of(b"x"), 1), Some("v1")).unwrap();
    let artifact = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "text/x", "layers": [],
        "subject": {"mediaType": MANIFEST, "digest": subject.to_string(), "size": 1},
    });
    let artifact = registry.put_manifest("r", MANIFEST, artifact.to_string(), None).unwrap();
    let answer = connect(&registry).get(&format!("/v2/r/referrers/{subject}")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    assert_eq!(index["manifests"][0]["digest"], artifact.to_string());
    assert_eq!(index["manifests"][0]["artifactType"], "text/x");
    for (only, count) in [("text/x", 1), ("text/y", 0)] {
        let answer = connect(&registry).get(&format!("/v2/r/referrers/{subject}?artifactType={only}")).unwrap();
        assert_eq!(answer.header("oci-filters-applied"), Some("artifactType"));
        let index: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), count);
    }

    let without = TestRegistry::start(Config { referrers: false, ..Config::default() }).unwrap();
    assert_eq!(connect(&without).get(&format!("/v2/r/referrers/{subject}")).unwrap().status, 404);
}

#[test]
fn basic_credentials_are_asked_for() {
    let auth = Auth::Basic(Credentials::new("user", "pass"));
    let registry = TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
    let mut client = connect(&registry);
    let refused = client.get("/v2/").unwrap();
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic realm=\"test\"")));
    let with = |client: &mut Connection, value: &str| client.request("GET", "/v2/", &[("Authorization", value)], &[]);
    assert_eq!(with(&mut client, "Basic dXNlcjpwYXNz").unwrap().status, 200);
    assert_eq!(with(&mut client, "Basic dXNlcjpub25l").unwrap().status, 401);
}

#[test]
fn tokens_are_for_a_repository_and_an_action() {
    let credentials = Credentials::new("user", "pass");
    let auth = Auth::Bearer { credentials, anonymous_pull: true, token_lifetime_s: 60 };
    let registry = TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
    let digest = registry.put_blob("a/b", "bytes").unwrap();
    let blob = format!("/v2/a/b/blobs/{digest}");
    let mut client = connect(&registry);
    let challenge = client.get(&blob).unwrap();
    let address = registry.addr();
    let expected = format!("Bearer realm=\"http://{address}/_token\",service=\"test\",scope=\"repository:a/b:pull\"");
    assert_eq!((challenge.status, challenge.header("www-authenticate")), (401, Some(expected.as_str())));

    let token = |client: &mut Connection, scope: &str, basic: Option<&str>| {
        let headers: Vec<_> = basic.into_iter().map(|value| ("Authorization", value)).collect();
        let path = format!("/_token?service=test&scope={scope}");
        let answer = client.request("GET", &path, &headers, &[]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        json["token"].as_str().map(|token| format!("Bearer {token}")).ok_or(answer.status)
    };
    let read = token(&mut client, "repository%3Aa%2Fb%3Apull", None).unwrap();
    assert_eq!(client.request("GET", &blob, &[("Authorization", &read)], &[]).unwrap().status, 200);
    assert_eq!(
        client.request("GET", "/v2/c/manifests/v1", &[("Authorization", &read)], &[]).unwrap().status,
        401,
        "another repository"
    );
    let push = |client: &mut Connection, token: &str| {
        client.request("POST", "/v2/a/b/blobs/uploads/", &[("Authorization", token)], &[]).unwrap().status
    };
    let anonymous = token(&mut client, "repository:a/b:pull,push", None).unwrap();
    assert_eq!(push(&mut client, &anonymous), 401);
    let known = token(&mut client, "repository:a/b:pull,push", Some("Basic dXNlcjpwYXNz")).unwrap();
    assert_eq!(push(&mut client, &known), 202);
    assert_eq!(token(&mut client, "repository:a/b:pull", Some("Basic eDp5")), Err(401));
}
