//! Mirrors before a registry, as `hosts.toml` names them: who is asked, for what, and what becomes of one that fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind, Repository};
use ublkimg_tests::registry::{Auth, Config, Credentials, Fault, TestRegistry, Toxic};
use ublkimg_tests::sample_image::noise;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const BYTES: usize = 4_000_000;

/// A registry and its mirrors, all with the repository `a`, its blob and the tag `v1`.
struct Fixture {
    directory: TempDir,
    origin: TestRegistry,
    mirrors: Vec<TestRegistry>,
    bytes: Vec<u8>,
    blob: Digest,
}

impl Fixture {
    fn new(mirrors: usize, auth: Auth) -> Self {
        let start = |auth| TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
        let (origin, bytes) = (start(auth), noise(7, BYTES));
        let mirrors: Vec<_> = (0..mirrors).map(|_| start(Auth::Anonymous)).collect();
        for registry in std::iter::once(&origin).chain(&mirrors) {
            registry.put_blob("a", bytes.clone()).unwrap();
            registry.put_manifest("a", MANIFEST, "{}", Some("v1")).unwrap();
        }
        Self { directory: tempfile::tempdir().unwrap(), origin, mirrors, blob: Digest::of(&bytes), bytes }
    }

    /// The mirrors in their order, each with more lines of its table.
    fn hosts(&self, lines: &str) -> String {
        self.mirrors.iter().map(|mirror| format!("[host.\"http://{}\"]\n{lines}\n", mirror.addr())).collect()
    }

    async fn open(&self, hosts: &str) -> Repository {
        let registry = self.origin.addr().to_string();
        let directory = self.directory.path().join(registry);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), hosts).unwrap();
        let auth_file = self.directory.path().join("auth.json");
        // user:secret, for the registry and for nobody else.
        let auths = format!(r#"{{"auths": {{"{}": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#, self.origin.addr());
        std::fs::write(&auth_file, auths).unwrap();
        let options = ClientOptions {
            auth_file: Some(auth_file),
            hosts_dirs: vec![self.directory.path().to_owned()],
            ..ClientOptions::default()
        };
        Repository::open(&self.origin.reference("a", "v1").parse().unwrap(), &options).await.unwrap()
    }

    /// Reads a part of the blob and compares it.
    async fn read(&self, repository: &Repository, start: usize) {
        let end = start + 1000;
        let read = repository.blob_range(&self.blob, start as u64..end as u64).await.unwrap();
        assert!(read == self.bytes[start..end]);
    }

    fn sent_by_origin(&self) -> u64 {
        self.origin.stats().blobs.values().map(|blob| blob.bytes_sent).sum()
    }
}

/// Refused with 401 until `user:secret` comes.
fn with_password() -> Auth {
    Auth::Basic(Credentials { user: "user".into(), password: "secret".into() })
}

#[tokio::test]
async fn mirrors_are_asked_in_their_order_and_the_registry_last() {
    let fixture = Fixture::new(2, Auth::Anonymous);
    let repository = fixture.open(&fixture.hosts("")).await;
    repository.resolve().await.unwrap();
    fixture.read(&repository, 0).await;
    let mut reader = repository.blob(&fixture.blob, BYTES as u64).await.unwrap();
    let mut whole = Vec::new();
    reader.read_to_end(&mut whole).await.unwrap();
    assert!(whole == fixture.bytes);
    let asked = |registry: &TestRegistry| registry.stats().requests.values().sum::<u64>();
    assert_eq!((asked(&fixture.mirrors[0]), asked(&fixture.mirrors[1]), asked(&fixture.origin)), (3, 0, 0));
}

#[tokio::test]
async fn a_mirror_that_is_down_is_left_alone() {
    let fixture = Fixture::new(2, Auth::Anonymous);
    fixture.mirrors[0].set_fault("away", Fault::new("*", Toxic::Refuse));
    let repository = fixture.open(&fixture.hosts("")).await;
    fixture.read(&repository, 0).await;
    fixture.mirrors[0].clear_fault("away");
    fixture.read(&repository, 5000).await;
    assert_eq!(fixture.mirrors[0].stats().requests_of("blob_get"), 0, "not asked again so soon");
    assert_eq!((fixture.mirrors[1].stats().requests_of("blob_get"), fixture.sent_by_origin()), (2, 0));
}

#[tokio::test]
async fn a_mirror_that_wants_to_be_asked_later_is_passed_by() {
    let fixture = Fixture::new(1, Auth::Anonymous);
    let busy = Toxic::TooManyRequests { retry_after_s: 50 };
    fixture.mirrors[0].set_fault("busy", Fault::new("*", busy).times(1));
    let repository = fixture.open(&fixture.hosts("")).await;
    fixture.read(&repository, 0).await;
    fixture.read(&repository, 5000).await;
    assert_eq!(fixture.mirrors[0].fault_hits("busy"), 1);
    assert_eq!(fixture.sent_by_origin(), 2000);
}

#[tokio::test]
async fn what_a_mirror_lacks_comes_from_the_registry() {
    let fixture = Fixture::new(1, with_password());
    let other = noise(8, 5000);
    let lacking = Digest(fixture.origin.put_blob("a", other.clone()).unwrap().0);
    let repository = fixture.open(&fixture.hosts("")).await;
    for _ in 0..3 {
        assert!(repository.blob_range(&lacking, 0..5000).await.unwrap() == other);
    }
    assert_eq!(fixture.mirrors[0].stats().statuses[&404], 1, "asked for it once");
    fixture.read(&repository, 0).await;
    assert_eq!(fixture.sent_by_origin(), 15_000, "and the mirror for the rest");
    let missing = Digest::of(b"nowhere");
    assert_eq!(repository.blob_range(&missing, 0..1).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_stream_goes_on_where_its_mirror_broke() {
    let fixture = Fixture::new(1, Auth::Anonymous);
    fixture.mirrors[0].set_fault("short", Fault::new("*/blobs/*", Toxic::ShortBody { after_bytes: 1_000_000 }));
    let repository = fixture.open(&fixture.hosts("")).await;
    let mut stream = repository.blob_stream(&fixture.blob, 10..BYTES as u64);
    let mut read = Vec::new();
    while let Some(piece) = stream.next().await {
        read.extend_from_slice(&piece.unwrap());
    }
    assert!(read == fixture.bytes[10..]);
    let sent = fixture.sent_by_origin();
    assert!(sent > 0 && sent <= BYTES as u64 - 10, "{sent}");
    assert_eq!(fixture.origin.stats().duplicate_bytes, 0);
}

#[tokio::test]
async fn a_mirror_is_asked_only_for_what_it_may_answer() {
    let fixture = Fixture::new(1, Auth::Anonymous);
    let newer = Digest(fixture.origin.put_manifest("a", MANIFEST, "{\"newer\": 1}", Some("v1")).unwrap().0);
    let repository = fixture.open(&fixture.hosts("capabilities = [\"pull\"]")).await;
    assert_eq!(repository.resolve().await.unwrap().digest, newer);
    fixture.read(&repository, 0).await;
    assert_eq!((fixture.origin.stats().requests_of("manifest_get"), fixture.sent_by_origin()), (1, 0));
    // A mirror may be behind; what is to be written must not be.
    let repository = fixture.open(&fixture.hosts("")).await;
    assert_ne!(repository.resolve().await.unwrap().digest, newer);
    assert_eq!(repository.without_mirrors().resolve().await.unwrap().digest, newer);
}

#[tokio::test]
async fn other_bytes_of_a_mirror_are_no_manifest() {
    let fixture = Fixture::new(1, Auth::Anonymous);
    fixture.mirrors[0].set_fault("flip", Fault::new("*/manifests/*", Toxic::BitFlip { offset_bytes: 0 }));
    let repository = fixture.open(&fixture.hosts("")).await;
    let digest = Digest::of(b"{}");
    assert_eq!(&repository.manifest(&digest).await.unwrap()[..], b"{}");
    assert!(fixture.mirrors[0].fault_hits("flip") >= 1);
}

#[tokio::test]
async fn what_is_written_goes_to_the_registry() {
    let fixture = Fixture::new(1, with_password());
    let repository = fixture.open(&fixture.hosts("")).await;
    let blob = b"new".as_slice();
    let (digest, source) = (Digest::of(blob), BlobSource::Bytes(bytes::Bytes::from_static(b"new")));
    repository.push_blob(&digest, 3, source, None).await.unwrap();
    repository.push_manifest(MANIFEST, bytes::Bytes::from_static(b"{\"a\": 1}"), Some("v2")).await.unwrap();
    assert!(fixture.mirrors[0].stats().requests.is_empty());
    assert!(fixture.origin.manifest("a", "v2").unwrap().is_some());
}

/// A host that answers 404 to everything and keeps what it was asked.
fn eavesdropper() -> (SocketAddr, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, heard) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(String::new())));
    let keeper = Arc::clone(&heard);
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let (mut connection, mut head) = (connection.unwrap(), Vec::new());
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if connection.read(&mut byte).unwrap_or(0) == 0 {
                    break;
                }
                head.extend(byte);
            }
            keeper.lock().unwrap().push_str(&String::from_utf8_lossy(&head));
            let _ = connection.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (address, heard)
}

#[tokio::test]
async fn each_host_hears_what_is_meant_for_it() {
    let fixture = Fixture::new(0, with_password());
    let [(first, first_heard), (second, second_heard)] = [eavesdropper(), eavesdropper()];
    let hosts = format!("[host.\"http://{first}\".header]\nx-key = \"for-first\"\n[host.\"http://{second}\"]\n");
    let repository = fixture.open(&hosts).await;
    repository.resolve().await.unwrap();
    fixture.read(&repository, 0).await;
    let [first, second] = [first_heard, second_heard].map(|heard| heard.lock().unwrap().to_lowercase());
    for heard in [&first, &second] {
        assert!(
            heard.contains(&format!("get /v2/a/manifests/v1?ns={}", fixture.origin.addr()).replace(':', "%3a")),
            "{heard}"
        );
        assert!(!heard.contains("authorization"), "{heard}");
    }
    assert!(first.contains("x-key: for-first") && !second.contains("x-key"), "{first}\n{second}");
    assert!(fixture.origin.stats().statuses.contains_key(&401), "the registry asked, and was shown");
}
