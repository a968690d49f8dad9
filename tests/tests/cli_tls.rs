//! Certificates of `hosts.toml`: whom a host believes, and what it shows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use ublkimg_tests::command::{Outcome, ublkimg};
use ublkimg_tests::host::Host;
use ublkimg_tests::registry::TestRegistry;
use ublkimg_tests::skip;
use ublkimg_tests::tls::{Authority, TlsFront};

/// A host whose registry is spoken to over TLS, and the files that it may name.
struct Fixture {
    host: Host,
    /// Has signed the certificates of the registry and of `client`.
    ours: Authority,
    client: (PathBuf, PathBuf),
    /// Has signed nothing that counts.
    other: Authority,
    front: TlsFront,
}

impl Fixture {
    /// The registry wants a client certificate, or does not.
    fn new(wants_client: bool) -> Self {
        let host = Host::with_sample();
        let ours = Authority::new(host.root.join("ours")).unwrap();
        let other = Authority::new(host.root.join("other")).unwrap();
        let (server, client) = (ours.issue("server").unwrap(), ours.issue("client").unwrap());
        let front = TlsFront::start(host.registry.addr(), &server, wants_client.then_some(&ours)).unwrap();
        Self { host, ours, client, other, front }
    }

    /// A `hosts.toml` for the registry behind TLS.
    fn hosts(&self, lines: &str) {
        self.serve_as(&self.front.addr().to_string(), lines);
    }

    /// The same, with the registry's answers at another address.
    fn serve_as(&self, address: &str, lines: &str) {
        let directory = self.host.root.join("certs.d").join(self.front.addr().to_string());
        std::fs::create_dir_all(&directory).unwrap();
        let server = format!("server = \"https://{address}\"\n{lines}\n");
        std::fs::write(directory.join("hosts.toml"), server).unwrap();
    }

    fn ca(&self, authority: &Authority) -> String {
        format!("ca = {:?}\n", authority.certificate())
    }

    /// `inspect` reads the manifests; no blob.
    fn inspect(&self) -> Outcome {
        let reference = format!("{}/sample:v1", self.front.addr());
        ublkimg(self.host.root.path()).args(["inspect", &reference]).run()
    }
}

#[test]
fn an_authority_of_hosts_toml_is_believed_and_nobody_else() {
    if !Authority::is_possible() {
        skip!("there is no openssl");
    }
    let fixture = Fixture::new(false);
    fixture.hosts(&fixture.ca(&fixture.ours));
    fixture.inspect().success();
    // Relative to the file, and one of a list.
    let beside = fixture.host.root.join("certs.d").join(fixture.front.addr().to_string()).join("ca.pem");
    std::fs::copy(fixture.ours.certificate(), beside).unwrap();
    fixture.hosts(&format!("ca = [{:?}, \"ca.pem\"]", fixture.other.certificate()));
    fixture.inspect().success();

    let name = fixture.front.addr().to_string();
    // Both authorities have one name, so the first is an issuer whose signature is wrong; the second is no issuer at all.
    for lines in [fixture.ca(&fixture.other).as_str(), ""] {
        fixture.hosts(lines);
        let refused = fixture.inspect();
        refused.refused(7, &[&name, "nobody whom this host believes has signed it", "ca in hosts.toml"]);
        assert!(!refused.stderr.contains("gave up after"), "tried once: {}", refused.stderr);
    }
    fixture.hosts("ca = \"absent.pem\"");
    fixture.inspect().refused(12, &["absent.pem"]);
    fixture.hosts("skip_verify = true");
    fixture.inspect().refused(2, &["skip_verify is refused"]);

    // Good for 127.0.0.1 only.
    let port = fixture.front.addr().port();
    fixture.serve_as(&format!("localhost:{port}"), &fixture.ca(&fixture.ours));
    fixture.inspect().refused(7, &[&name, "127.0.0.1", "server in hosts.toml"]);
    fixture.serve_as(&fixture.host.registry.addr().to_string(), "");
    fixture.inspect().refused(7, &[&name, "speaks plain HTTP", "hosts.toml"]);
}

#[test]
fn a_certificate_of_another_time_is_refused_and_says_so() {
    if !Authority::is_possible() {
        skip!("there is no openssl");
    }
    let mut fixture = Fixture::new(false);
    for (from, to, said) in [
        ("20200101000000Z", "20210101000000Z", "has expired; it needs a new one"),
        ("20980101000000Z", "20990101000000Z", "is not valid yet; set this host's clock"),
    ] {
        let certificate = fixture.ours.issue_for_a_time("of-another-time", from, to).unwrap();
        fixture.front = TlsFront::start(fixture.host.registry.addr(), &certificate, None).unwrap();
        fixture.hosts(&fixture.ca(&fixture.ours));
        let refused = fixture.inspect();
        refused.refused(7, &[&fixture.front.addr().to_string(), said]);
        assert!(!refused.stderr.contains("gave up after"), "tried once: {}", refused.stderr);
    }
}

#[test]
fn a_registry_that_wants_a_client_certificate_is_shown_that_of_hosts_toml() {
    if !Authority::is_possible() {
        skip!("there is no openssl");
    }
    let fixture = Fixture::new(true);
    let name = fixture.front.addr().to_string();
    let ca = fixture.ca(&fixture.ours);
    fixture.hosts(&ca);
    fixture.inspect().refused(7, &[&name, "wants a client certificate", "client in hosts.toml"]);
    let (certificate, key) = fixture.other.issue("client").unwrap();
    fixture.hosts(&format!("{ca}client = [[{certificate:?}, {key:?}]]"));
    fixture.inspect().refused(7, &[&name, "refuses the client certificate"]);

    let (certificate, key) = &fixture.client;
    fixture.hosts(&format!("{ca}client = [[{certificate:?}, {key:?}]]"));
    fixture.inspect().success();
    // Blobs too, and both in one file.
    let both = fixture.host.root.join("both.pem");
    std::fs::write(&both, [std::fs::read(certificate).unwrap(), std::fs::read(key).unwrap()].concat()).unwrap();
    fixture.hosts(&format!("{ca}client = {both:?}"));
    let reference = format!("{name}/sample:v1");
    ublkimg(fixture.host.root.path()).args(["pull", &reference]).run().success();
}

#[test]
fn a_mirror_over_tls_is_spoken_to_with_its_own_certificates_and_passed_by_without() {
    if !Authority::is_possible() {
        skip!("there is no openssl");
    }
    let fixture = Fixture::new(true);
    let origin = TestRegistry::start(Default::default()).unwrap();
    origin.load_layout(&fixture.host.root.join("converted/sample"), Some("v1"), "sample", "v1").unwrap();
    let directory = fixture.host.root.join("certs.d").join(origin.addr().to_string());
    std::fs::create_dir_all(&directory).unwrap();
    let inspect = |lines: &str| {
        let text = format!("[host.\"https://{}\"]\n{lines}", fixture.front.addr());
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
        origin.reset_stats();
        let reference = origin.reference("sample", "v1");
        ublkimg(fixture.host.root.path()).args(["inspect", &reference]).run().success();
        origin.stats().requests.values().sum::<u64>()
    };
    let (certificate, key) = &fixture.client;
    let ca = fixture.ca(&fixture.ours);
    assert_eq!(inspect(&format!("{ca}client = [[{certificate:?}, {key:?}]]")), 0, "all from the mirror");
    assert!(inspect(&ca) > 0, "from the registry");
}
