//! From a registry to a registry, against Debian's `docker-registry`.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ublkimg_convert::ErrorKind;

use crate::same::fixture_file;
use crate::{exported, fixture, run};

/// A registry on a loopback port, stopped when dropped.
struct Registry {
    process: Child,
    host: String,
}

impl Registry {
    /// `None` where the program is not installed.
    fn start(dir: &Path) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n",
            dir.join("registry").display()
        );
        std::fs::write(dir.join("registry.yml"), config).unwrap();
        let mut command = Command::new("docker-registry");
        command.args(["serve", "registry.yml"]).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().ok()?;
        let log = BufReader::new(process.stderr.take().unwrap());
        let mut lines = log.lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("listening on")), "docker-registry does not start");
        // The pipe must stay open and be read, or the registry blocks.
        std::thread::spawn(move || lines.count());
        Some(Self { process, host })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_registry_to_registry() {
    let dir = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(dir.path()) else {
        println!("SKIP: docker-registry is not installed");
        return;
    };
    let host = &registry.host;
    let tar = [fixture_file("usr/lib/file", &fixture::noise(1, 3_000_000)), vec![0; 1024]].concat();
    let layers = [(fixture::TAR_GZIP, fixture::gzip(&tar)), (fixture::TAR, tar.clone())];
    let config = fixture::config(&[fixture::sha256(&tar), fixture::sha256(&tar)]);
    let source = format!("{host}/source:v1");
    fixture::push_layers(&source, &layers, &config).await;

    let destination = format!("{host}/converted:v1");
    let pushed = run(&source, &destination).await.unwrap();
    let local = run(&source, &format!("oci:{}/local:v1", dir.path().display())).await.unwrap();
    assert_eq!(pushed.digest, local.digest);
    let again = run(&source, &format!("{host}/converted:v2")).await.unwrap();
    assert_eq!(again.digest, pushed.digest);
    assert!(again.images[0].layers.iter().all(|layer| layer.existed));
    fixture::fsck(exported(&destination).await.path());

    let error = run(&format!("{host}/source:nothing"), &destination).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = run(&source, &format!("{host}/converted@{}", pushed.digest)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}
