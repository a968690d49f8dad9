//! Where credentials are looked for, and the helpers that keep them: docker's `credHelpers` and `credsStore`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ublkimg_tests::command::{Outcome, ublkimg};
use ublkimg_tests::host::Host;
use ublkimg_tests::registry::{Auth, Credentials};
use ublkimg_tests::sample_image::SampleImage;

/// A host with docker's and podman's files, helpers on its PATH, and a registry that gives no token to strangers.
struct Fixture {
    host: Host,
    registry: String,
}

impl Fixture {
    fn new() -> Self {
        let credentials = Credentials::new("user", "right");
        let host = Host::new(Auth::Bearer { credentials, anonymous_pull: false, token_lifetime_s: 60 });
        SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
        host.convert("source", "library/sample");
        let registry = host.registry.addr().to_string();
        let fixture = Self { host, registry };
        let keeps = r#"printf '{"ServerURL":"%s","Username":"user","Secret":"%s"}' "$server" "$(cat "$0.secret")""#;
        fixture.helper("keeps", keeps);
        fixture.helper("empty", "echo credentials not found in native keychain; exit 1");
        fixture.secret("right");
        fixture
    }

    /// `docker-credential-NAME`, which writes down what it is asked before it answers.
    fn helper(&self, name: &str, answer: &str) {
        let log = self.host.root.join("asked");
        let text = format!("#!/bin/sh\nread -r server\necho \"{name} $1 $server\" >>{}\n{answer}\n", log.display());
        let path = self.path(&format!("bin/docker-credential-{name}"), &text);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// What `docker-credential-keeps` keeps.
    fn secret(&self, secret: &str) {
        self.path("bin/docker-credential-keeps.secret", secret);
    }

    /// A file below the host's root, with REGISTRY in it replaced.
    fn path(&self, below: &str, text: &str) -> PathBuf {
        let path = self.host.root.join(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text.replace("REGISTRY", &self.registry)).unwrap();
        path
    }

    /// Runs a command as somebody who has these files of podman's and docker's; also what helpers were asked, each thing once.
    fn ask(&self, podman: &str, docker: &str, command: &[&str]) -> (Outcome, Vec<String>) {
        self.path(".config/containers/auth.json", podman);
        self.path("docker/config.json", docker);
        self.path("asked", "");
        let path = format!("{}:{}", self.host.root.join("bin").display(), std::env::var("PATH").unwrap());
        let command = ublkimg(self.host.root.path()).args(command);
        let outcome = command.env("PATH", path).env("DOCKER_CONFIG", self.host.root.join("docker")).run();
        let asked = std::fs::read_to_string(self.host.root.join("asked")).unwrap();
        let mut asked: Vec<String> = asked.lines().map(|line| line.replace(&self.registry, "REGISTRY")).collect();
        asked.dedup();
        (outcome, asked)
    }
}

#[test]
fn a_helper_of_the_registry_goes_before_its_entry_and_that_before_the_store() {
    let fixture = Fixture::new();
    let reference = fixture.host.registry.reference("library/sample", "v1");
    let [right, wrong] = ["right", "wrong"].map(|password| STANDARD.encode(format!("user:{password}")));
    let with_entry = |rest: &str| format!(r#"{{"auths": {{"REGISTRY": {{"auth": "{wrong}"}}}}, {rest}}}"#);
    for (podman, docker, expected) in [
        (
            "",
            with_entry(r#""credHelpers": {"REGISTRY": "keeps"}, "credsStore": "absent""#),
            &["keeps get REGISTRY"][..],
        ),
        ("", with_entry(r#""credsStore": "absent""#).replace(&wrong, &right), &[]),
        // docker leaves an empty entry behind where a helper keeps the secret.
        ("", r#"{"auths": {"REGISTRY": {}}, "credsStore": "keeps"}"#.to_owned(), &["keeps get REGISTRY"]),
        ("", r#"{"credHelpers": {"other.io": "absent"}, "credsStore": "keeps"}"#.to_owned(), &["keeps get REGISTRY"]),
        // Nothing on file is no answer: the next file is asked.
        (
            r#"{"credHelpers": {"REGISTRY": "empty"}}"#,
            r#"{"credsStore": "keeps"}"#.to_owned(),
            &["empty get REGISTRY", "keeps get REGISTRY"],
        ),
    ] {
        let (outcome, asked) = fixture.ask(podman, &docker, &["inspect", &reference]);
        assert_eq!(
            (outcome.code, asked),
            (Some(0), expected.iter().map(|line| (*line).to_owned()).collect()),
            "{docker}"
        );
    }
}

#[test]
fn a_secret_that_the_helper_changes_is_asked_for_again() {
    let fixture = Fixture::new();
    let reference = fixture.host.registry.reference("library/sample", "v1");
    let pull = || fixture.ask("", r#"{"credsStore": "keeps"}"#, &["pull", &reference]);
    pull().0.success();
    fixture.secret("other");
    let (refused, _) = fixture.ask("", r#"{"credsStore": "keeps"}"#, &["inspect", &reference]);
    refused.refused(4, &["were refused"]);
    fixture.secret("right");
    pull().0.success();
}

#[test]
fn docker_hub_is_asked_for_by_the_name_that_docker_has_for_it() {
    let fixture = Fixture::new();
    fixture.path("certs.d/docker.io/hosts.toml", "server = \"http://REGISTRY\"\n");
    let hub = "keeps get https://index.docker.io/v1/";
    for docker in [
        r#"{"credsStore": "keeps"}"#,
        r#"{"credHelpers": {"docker.io": "keeps"}}"#,
        r#"{"credHelpers": {"https://index.docker.io/v1/": "keeps"}}"#,
    ] {
        let (outcome, asked) = fixture.ask("", docker, &["inspect", "sample:v1"]);
        outcome.success();
        assert_eq!(asked, [hub], "{docker}");
    }
}
