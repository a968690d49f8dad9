//! What a `hosts.toml` means.

use super::*;

fn parse(text: &str) -> Result<Hosts> {
    let reference = "registry.test/a/b:v1".parse().unwrap();
    Hosts::parse(Path::new("/certs.d/registry.test/hosts.toml"), text, &reference, &ClientOptions::default())
}

#[test]
fn mirrors_come_in_the_order_of_the_file() {
    let hosts = parse(
        r#"
        server = "https://upstream.test"
        ca = "own.pem"
        [host."https://z.test:5000/cache/"]
          capabilities = ["pull"]
          client = [["client.pem", "client.key"]]
          [host."https://z.test:5000/cache/".header]
            x-one = "1"
            x-two = ["2", "3"]
        [host."http://a.test/v2"]
          skip_verify = true
          dial_timeout = "3s"
        [host."b.test/other"]
          override_path = true
          capabilities = ["resolve"]
        "#,
    )
    .unwrap();
    let facts = |host: &Host| (host.endpoint.address.to_string(), host.pulls, host.resolves);
    let expected = [
        ("https://z.test:5000/cache/v2".to_owned(), true, false),
        ("http://a.test/v2".to_owned(), true, true),
        ("https://b.test/other".to_owned(), false, true),
    ];
    assert_eq!(hosts.mirrors.iter().map(facts).collect::<Vec<_>>(), expected);
    let first = &hosts.mirrors[0].endpoint;
    assert_eq!((&*first.name, first.namespace.as_deref()), ("z.test:5000", Some("registry.test")));
    let beside = |name: &str| PathBuf::from("/certs.d/registry.test").join(name);
    assert_eq!(first.identity, Some((beside("client.pem"), Some(beside("client.key")))));
    assert_eq!(first.headers.get_all("x-two").iter().count(), 2);
    assert!(!format!("{:?}", hosts.mirrors).contains("x-one"), "headers can be credentials");
    let server = &hosts.server;
    assert_eq!((server.address.as_str(), &*server.name), ("https://upstream.test/v2", "registry.test"));
    assert_eq!((&server.authorities, &server.namespace), (&vec![beside("own.pem")], &None));
}

#[test]
fn a_file_without_a_server_means_the_registry_itself() {
    let hosts = parse("[host.\"localhost:5000\"]").unwrap();
    assert_eq!(hosts.server.address.as_str(), "https://registry.test/v2");
    assert_eq!(hosts.mirrors[0].endpoint.address.as_str(), "http://localhost:5000/v2");
}

#[test]
fn what_is_wrong_is_named() {
    for (text, what) in [
        ("server = 5", "expected a string"),
        ("[host.\"https://m.test\"]\nskip_verify = true", "skip_verify is refused"),
        ("[host.\"ftp://m.test\"]", "ftp://m.test"),
        ("[host.\"https://u:p@m.test\"]", "is no address"),
        ("[host.\"https://m.test\".header]\n\"a b\" = \"1\"", "header a b"),
        ("[host.\"https://m.test\".header]\na = 1", "header a"),
        ("[host.\"https://m.test\"]\nclient = [[\"a\"], [\"b\"]]", "client"),
        ("[host.\"https://m.test\"]\ncapabilities = 1", "host https://m.test"),
        ("[host", "hosts.toml: "),
    ] {
        let said = parse(text).unwrap_err().to_string();
        assert!(said.starts_with("/certs.d/registry.test/hosts.toml: ") && said.contains(what), "{said}");
    }
}

#[test]
fn the_first_directory_with_a_file_counts() {
    let directory = tempfile::tempdir().unwrap();
    let write = |below: &str, host: &str| {
        let at = directory.path().join(below);
        std::fs::create_dir_all(&at).unwrap();
        std::fs::write(at.join("hosts.toml"), format!("[host.\"https://{host}\"]")).unwrap();
    };
    let hosts_dirs = ["one", "two"].map(|name| directory.path().join(name)).to_vec();
    let options = ClientOptions { hosts_dirs, ..ClientOptions::default() };
    let first = |reference: &str| {
        let hosts = Hosts::of(&reference.parse().unwrap(), &options).unwrap();
        hosts.mirrors.first().map(|host| host.endpoint.name.clone())
    };
    assert_eq!(first("r.test:5000/a"), None);
    write("two/_default", "d.test");
    assert_eq!(first("r.test:5000/a").as_deref(), Some("d.test"));
    write("one/r.test:5000", "m.test");
    assert_eq!(first("r.test:5000/a").as_deref(), Some("m.test"));
    write("one/r.test_5000_", "n.test");
    assert_eq!(first("r.test:5000/a").as_deref(), Some("n.test"));
    assert_eq!(first("docker.io/a").as_deref(), Some("d.test"));
}
