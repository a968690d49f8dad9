//! What hangs on a manifest: from the API, from the tag, and from registries that do neither well.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use ublkimg_registry::descriptor::{Descriptor, Index};
use ublkimg_registry::{Digest, ErrorKind, Repository};

use crate::fake::{Answer, Fake, Seen, answer, options};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const KIND: &str = "application/vnd.example.kind";

fn subject() -> Digest {
    Digest::of(b"subject")
}

fn entry(name: &str, kind: &str) -> String {
    format!(
        r#"{{"mediaType":"{MANIFEST}","digest":"{}","size":1,"artifactType":"{kind}"}}"#,
        Digest::of(name.as_bytes())
    )
}

fn list(entries: &[String]) -> String {
    format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#, entries.join(","))
}

fn index(body: &str) -> Answer {
    answer(200, &[("Content-Type", INDEX)], body)
}

fn manifest() -> Bytes {
    let subject = subject();
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"{KIND}","layers":[],"subject":{{"mediaType":"{MANIFEST}","digest":"{subject}","size":7}},"annotations":{{"a":"b"}}}}"#
    );
    text.into()
}

fn digests(listed: &[Descriptor]) -> Vec<Digest> {
    listed.iter().map(|entry| entry.digest).collect()
}

#[tokio::test]
async fn the_api_is_asked_and_its_pages_are_followed() {
    let fake = Fake::start(|request, number| {
        let path = format!("/v2/app/web/referrers/{}", subject());
        match number {
            0 => {
                assert_eq!(request.target, format!("{path}?artifactType=application%2Fvnd.example.kind"));
                let next = format!("<{path}?page=2>; rel=\"next\"");
                let body = list(&[entry("1", KIND), entry("2", "other")]);
                answer(200, &[("Content-Type", INDEX), ("Link", &next)], body)
            }
            _ => {
                assert_eq!(request.target, format!("{path}?page=2"));
                index(&list(&[entry("3", KIND)]))
            }
        }
    })
    .await;
    let repository = fake.open(&options()).await;
    let listed = repository.referrers(&subject(), Some(KIND)).await.unwrap();
    assert_eq!(digests(&listed), [Digest::of(b"1"), Digest::of(b"3")]);
    assert_eq!(fake.count(), 2);
}

#[tokio::test]
async fn endless_pages_end() {
    let fake = Fake::start(|request, number| {
        let next = format!("<{}>; rel=\"next\"", request.target);
        answer(200, &[("Content-Type", INDEX), ("Link", &next)], list(&[entry(&number.to_string(), KIND)]))
    })
    .await;
    let listed = fake.open(&options()).await.referrers(&subject(), None).await.unwrap();
    assert_eq!((listed.len(), fake.count()), (16, 16));
    let fake = Fake::start(|_, _| {
        answer(200, &[("Content-Type", INDEX), ("Link", "<http://example.com/x>; rel=\"next\"")], list(&[]))
    })
    .await;
    let error = fake.open(&options()).await.referrers(&subject(), None).await.unwrap_err();
    assert_eq!((error.kind(), fake.count()), (ErrorKind::Corrupt, 1), "credentials go nowhere else");
}

#[tokio::test]
async fn whatever_is_no_list_means_that_the_tag_counts() {
    type Headers = &'static [(&'static str, &'static str)];
    let answers: [(u16, Headers); 7] = [
        (404, &[]),
        (400, &[]),
        (405, &[]),
        (501, &[]),
        (302, &[("Location", "https://login.example.com/")]),
        (200, &[("Content-Type", "text/html")]),
        (200, &[("Content-Type", "application/json")]),
    ];
    for (status, headers) in answers {
        for tagged in [true, false] {
            let fake = Fake::start(move |request, _| {
                if request.target.contains("/referrers/") {
                    return answer(status, headers, "<html>");
                }
                assert_eq!(request.target, format!("/v2/app/web/manifests/sha256-{}", subject().hex()));
                if tagged { index(&list(&[entry("1", KIND), entry("2", "other")])) } else { answer(404, &[], "") }
            })
            .await;
            let listed = fake.open(&options()).await.referrers(&subject(), Some(KIND)).await.unwrap();
            assert_eq!(listed.len(), usize::from(tagged), "{status}");
            assert_eq!(fake.count(), 2);
        }
    }
}

#[tokio::test]
async fn refusals_and_rubbish_are_errors() {
    for (status, kind) in [(403, ErrorKind::Unauthorized), (200, ErrorKind::Corrupt)] {
        let fake = Fake::start(move |_, _| answer(status, &[("Content-Type", INDEX)], "{")).await;
        let error = fake.open(&options()).await.referrers(&subject(), None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    let fake = Fake::start(|_, number| if number == 0 { answer(503, &[], "") } else { index(&list(&[])) }).await;
    assert_eq!(fake.open(&options()).await.referrers(&subject(), None).await.unwrap(), []);
}

/// A registry without the API that keeps what is put, and does `before` ahead of each answer.
async fn plain(before: impl Fn(&Seen, &mut HashMap<String, Vec<u8>>) + Send + Sync + 'static) -> Fake {
    let kept: Arc<Mutex<HashMap<String, Vec<u8>>>> = Arc::default();
    Fake::start(move |request, _| {
        let mut kept = kept.lock().unwrap();
        before(request, &mut kept);
        match request.method.as_str() {
            "PUT" => {
                kept.insert(request.target.clone(), request.body.clone());
                answer(201, &[], "")
            }
            _ => kept
                .get(&request.target)
                .map_or_else(|| answer(404, &[], ""), |body| answer(200, &[("Content-Type", INDEX)], body)),
        }
    })
    .await
}

async fn push(fake: &Fake) -> (Repository, Result<Digest, ublkimg_registry::Error>) {
    let repository = fake.open(&options()).await;
    let result = repository.push_referrer(manifest()).await;
    (repository, result)
}

#[tokio::test]
async fn a_registry_with_the_api_needs_no_tag() {
    let fake = Fake::start(|_, _| answer(201, &[("OCI-Subject", &subject().to_string())], "")).await;
    assert_eq!(push(&fake).await.1.unwrap(), Digest::of(&manifest()));
    let seen = fake.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].target, format!("/v2/app/web/manifests/{}", Digest::of(&manifest())));
    assert_eq!(seen[0].header("content-type"), Some(MANIFEST));
}

#[tokio::test]
async fn without_the_api_the_tag_is_kept() {
    let fake = plain(|_, _| {}).await;
    let (repository, digest) = push(&fake).await;
    let digest = digest.unwrap();
    let listed = repository.referrers(&subject(), Some(KIND)).await.unwrap();
    assert_eq!(digests(&listed), [digest]);
    assert_eq!((listed[0].size, listed[0].annotations["a"].as_str()), (manifest().len() as u64, "b"));
    let puts = fake.seen().iter().filter(|seen| seen.method == "PUT").count();
    assert_eq!(push(&fake).await.1.unwrap(), digest);
    assert_eq!(fake.seen().iter().filter(|seen| seen.method == "PUT").count(), puts + 1, "the manifest, not the list");
}

#[tokio::test]
async fn entries_of_others_stay_in_the_tag() {
    let theirs = entry("theirs", "x").replace("\"size\":1", "\"size\":1,\"new\":[1.50]");
    let others = list(std::slice::from_ref(&theirs));
    let tag = format!("/v2/app/web/manifests/sha256-{}", subject().hex());
    let (before, at) = (others.clone(), tag.clone());
    let fake = plain(move |_, kept| {
        kept.entry(at.clone()).or_insert_with(|| before.clone().into_bytes());
    })
    .await;
    push(&fake).await.1.unwrap();
    let put = fake.seen().into_iter().rfind(|seen| seen.method == "PUT" && seen.target == tag).unwrap();
    let text = String::from_utf8(put.body).unwrap();
    assert!(text.starts_with(others.strip_suffix("]}").unwrap()), "{text}");
    assert_eq!(Index::parse(text.as_bytes()).unwrap().manifests.len(), 2);
}

#[tokio::test]
async fn a_lost_write_is_written_again_but_not_for_ever() {
    let tag = format!("/v2/app/web/manifests/sha256-{}", subject().hex());
    for (losses, ends_well) in [(2, true), (usize::MAX, false)] {
        let (at, lost) = (tag.clone(), Mutex::new(0));
        let fake = plain(move |request, kept| {
            let mut lost = lost.lock().unwrap();
            if request.method == "GET" && kept.contains_key(&at) && *lost < losses {
                *lost += 1;
                kept.insert(at.clone(), list(&[entry(&lost.to_string(), "x")]).into_bytes());
            }
        })
        .await;
        let (repository, result) = push(&fake).await;
        assert_eq!(result.is_ok(), ends_well, "{result:?}");
        if ends_well {
            assert_eq!(repository.referrers(&subject(), None).await.unwrap().len(), 2);
        }
    }
}

#[tokio::test]
async fn what_has_no_subject_is_not_pushed() {
    let fake = Fake::start(|_, _| answer(201, &[], "")).await;
    let repository = fake.open(&options()).await;
    for bad in ["{}", "[]", "{", r#"{"subject":null}"#] {
        let error = repository.push_referrer(Bytes::from_static(bad.as_bytes())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
    }
    assert_eq!(fake.count(), 0);
}
