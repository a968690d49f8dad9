use proptest::prelude::*;

use super::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn full(text: &str) -> String {
    text.parse::<Reference>().unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
}

#[test]
fn dockers_defaults() {
    for (text, expected) in [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a:b", "localhost:5000/a:b"),
        ("127.0.0.1:5000/app/web:v2", "127.0.0.1:5000/app/web:v2"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("host:5000/a", "host:5000/a:latest"),
        ("a_b/c--d/e.f__g", "docker.io/a_b/c--d/e.f__g:latest"),
    ] {
        assert_eq!(full(text), expected);
        assert_eq!(full(expected), expected, "round trip");
    }
}

#[test]
fn digests() {
    let by_digest: Reference = format!("h.io/a@sha256:{HEX}").parse().unwrap();
    assert_eq!(by_digest.tag(), None);
    assert_eq!(by_digest.to_string(), format!("h.io/a@sha256:{HEX}"));
    let both = format!("h.io/a:t@sha256:{HEX}");
    assert_eq!(full(&both), both);
    assert_eq!(full("h.io/a:t"), "h.io/a:t");
    let pinned = "h.io/a:t".parse::<Reference>().unwrap().with_digest(Digest::of(b""));
    assert_eq!(pinned.to_string(), both);
}

#[test]
fn malformed_references_are_refused() {
    let long = "a".repeat(256);
    for text in [
        "",
        ":",
        "a:",
        "/a",
        "a/",
        "a//b",
        "A",
        "h.io/A",
        "a:b c",
        "-a",
        "a-",
        "a..b",
        "a___b",
        "a@sha256:00",
        "h.io:0/a",
        "h.io:99999/a",
        "h.io:x/a",
        ".h/a",
        "[::1/a",
        "[x]:1/a",
        "a@b",
        "a:t:u",
        "https://h.io/a",
        "h.io/../a",
        "h.io/a?b",
        &long,
    ] {
        assert!(text.parse::<Reference>().is_err(), "{text:?} must be refused");
    }
}

#[test]
fn layout_locations() {
    let layout = |dir: &str, tag: Option<&str>| Location::Layout { dir: dir.into(), tag: tag.map(str::to_owned) };
    for (text, expected) in [
        ("oci:d", layout("d", None)),
        ("oci:/a/b:v1", layout("/a/b", Some("v1"))),
        ("oci:/a:b/c", layout("/a:b/c", None)),
        ("oci:/a:b/", layout("/a:b/", None)),
    ] {
        assert_eq!(text.parse::<Location>().unwrap(), expected);
        assert_eq!(expected.to_string(), text);
    }
    let odd = layout("/a:b", None);
    assert_eq!(odd.to_string(), "oci:/a:b/");
    for text in ["oci:", "oci::t", "oci:d:", "oci:d:a b"] {
        assert!(text.parse::<Location>().is_err(), "{text:?} must be refused");
    }
}

#[test]
fn loopback_hosts() {
    for (authority, expected) in [
        ("localhost:5000", true),
        ("127.0.0.1", true),
        ("127.8.9.1:80", true),
        ("[::1]:5000", true),
        ("localhost.example.com", false),
        ("128.0.0.1", false),
        ("10.0.0.1:5000", false),
    ] {
        assert_eq!(is_loopback(host_of(authority)), expected, "{authority}");
    }
}

proptest! {
    #[test]
    fn what_parses_round_trips(text in "(oci:)?[a-z0-9:/.@_A-]{0,40}(@sha256:[0-9a-f]{64})?") {
        if let Ok(location) = text.parse::<Location>() {
            let shown = location.to_string();
            prop_assert_eq!(shown.parse::<Location>().unwrap(), location, "{}", shown);
        }
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in ".*") {
        let _ = text.parse::<Location>();
        let _ = format!("oci:{text}").parse::<Location>();
        let _ = text.parse::<Digest>();
    }

    #[test]
    fn references_make_one_address(text in "[ -~]{0,60}") {
        if let Ok(reference) = text.parse::<Reference>() {
            let path = format!("/v2/{}/manifests/", reference.repository());
            let url = url::Url::parse(&format!("https://{}{path}", reference.api_authority())).unwrap();
            prop_assert_eq!(url.path(), path, "nothing in a name is more than a name");
        }
    }
}
