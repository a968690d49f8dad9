//! Against Debian's `docker-registry`, when it is installed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncReadExt;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind, Pushed, Repository};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

struct Registry {
    process: Child,
    authority: String,
    storage: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A registry on a free loopback port, or why there is none.
fn start() -> Option<Registry> {
    let storage = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let authority = format!("127.0.0.1:{port}");
        let config = storage.path().join("config.yml");
        let root = storage.path().join("data");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             http: {{addr: \"{authority}\", secret: x}}\n",
            root.display()
        );
        std::fs::write(&config, text).unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut process = match spawned {
            Ok(process) => process,
            Err(error) => {
                println!("SKIP: docker-registry cannot be run: {error}");
                return None;
            }
        };
        for _ in 0..200 {
            if std::net::TcpStream::connect(&authority).is_ok() {
                return Some(Registry { process, authority, storage });
            }
            if process.try_wait().unwrap().is_some() {
                break; // The port was taken in between.
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = process.kill();
        let _ = process.wait();
    }
    panic!("docker-registry does not start");
}

async fn open(registry: &Registry, name: &str) -> Repository {
    let options = ClientOptions {
        auth_file: Some("/dev/null".into()),
        retry_deadline: Duration::from_secs(2),
        ..ClientOptions::default()
    };
    Repository::open(&format!("{}/{name}", registry.authority).parse().unwrap(), &options).await.unwrap()
}

fn write(dir: &Path, bytes: &[u8]) -> BlobSource {
    let path = dir.join("blob");
    std::fs::write(&path, bytes).unwrap();
    BlobSource::File(path)
}

#[tokio::test]
async fn push_mount_and_read() {
    let Some(registry) = start() else { return };
    let repository = open(&registry, "app/web:v1").await;
    let error = repository.resolve().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(error.to_string(), format!("repository {}/app/web has no tag v1", registry.authority));

    let blob: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (digest, size_bytes) = (Digest::of(&blob), blob.len() as u64);
    let source = write(registry.storage.path(), &blob);
    let push = |repository: Repository, from: Option<&'static str>| {
        let source = source.clone();
        async move { repository.push_blob(&digest, size_bytes, source, from).await }
    };
    assert!(!repository.has_blob(&digest).await.unwrap());
    assert_eq!(push(repository.clone(), None).await.unwrap(), Pushed::Uploaded);
    assert_eq!(push(repository.clone(), None).await.unwrap(), Pushed::Existed);
    assert!(repository.has_blob(&digest).await.unwrap());
    let other = open(&registry, "other:latest").await;
    assert_eq!(push(other.clone(), Some("app/web")).await.unwrap(), Pushed::Mounted);
    let third = open(&registry, "third:latest").await;
    assert_eq!(push(third, Some("absent/repository")).await.unwrap(), Pushed::Uploaded, "falls back to an upload");

    for range in [0..1, 5..4096, size_bytes - 3..size_bytes, 0..size_bytes] {
        let bytes = other.blob_range(&digest, range.clone()).await.unwrap();
        assert_eq!(bytes, blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]);
    }
    let error = other.blob_range(&digest, size_bytes..size_bytes + 10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let mut whole = Vec::new();
    other.blob(&digest, size_bytes).await.unwrap().read_to_end(&mut whole).await.unwrap();
    assert_eq!(whole, blob);

    manifests(&repository, &digest, size_bytes).await;

    let wrong = Digest::of(b"something else");
    let error = repository.push_blob(&wrong, size_bytes, source.clone(), None).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Corrupt), "{error:?}");
}

async fn manifests(repository: &Repository, layer: &Digest, size_bytes: u64) {
    let config = Bytes::from_static(b"{}");
    let config_digest = Digest::of(&config);
    let pushed = repository.push_blob(&config_digest, 2, BlobSource::Bytes(config), None).await.unwrap();
    assert_eq!(pushed, Pushed::Uploaded);
    let manifest = Bytes::from(format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"{CONFIG}","digest":"{config_digest}","size":2}},
        "layers":[{{"mediaType":"application/vnd.erofs+zstd","digest":"{layer}","size":{size_bytes}}}]}}"#
    ));
    let digest = repository.push_manifest(MANIFEST, manifest.clone(), Some("v1")).await.unwrap();
    assert_eq!(repository.push_manifest(MANIFEST, manifest.clone(), None).await.unwrap(), digest);
    let resolved = repository.resolve().await.unwrap();
    assert_eq!((resolved.digest, resolved.media_type.as_str(), &resolved.bytes), (digest, MANIFEST, &manifest));
    assert_eq!(repository.manifest(&digest).await.unwrap(), manifest);
    let error = repository.manifest(&Digest::of(b"absent")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let absent = String::from_utf8(manifest.to_vec()).unwrap().replace(&layer.hex(), &Digest::of(b"absent").hex());
    let error = repository.push_manifest(MANIFEST, absent.into(), Some("bad")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("blob unknown to registry"), "{error}");
}

#[tokio::test]
async fn a_registry_that_is_down() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = ClientOptions { retry_deadline: Duration::ZERO, ..ClientOptions::default() };
    let location = format!("127.0.0.1:{port}/a").parse().unwrap();
    let error = Repository::open(&location, &options).await.unwrap().resolve().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.to_string(), format!("registry 127.0.0.1:{port} is not reachable: connection refused"));
}
