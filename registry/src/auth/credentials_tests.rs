use super::*;

fn files(dir: &Path, contents: &[&str]) -> CredentialFiles {
    let mut files = Vec::new();
    for (number, content) in contents.iter().enumerate() {
        let path = dir.join(format!("{number}.json"));
        std::fs::write(&path, content).unwrap();
        files.push(path);
    }
    CredentialFiles { files, required: false }
}

fn named(path: &str) -> CredentialFiles {
    CredentialFiles::new(&ClientOptions { auth_file: Some(path.into()), ..ClientOptions::default() })
}

fn password(user: &str, password: &str) -> Option<Credentials> {
    Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() })
}

async fn find(contents: &[&str], registry: &str, repository: &str) -> Result<Option<Credentials>> {
    let dir = tempfile::tempdir().unwrap();
    files(dir.path(), contents).find(registry, repository).await
}

#[tokio::test]
async fn the_longest_prefix_wins() {
    // "a:1" .. "d:4"
    let file = r#"{"auths": {"h.io": {"auth": "YToxCg=="}, "h.io/x": {"auth": "Yjoy"}, "h.io/x/y": {"auth": "Yzoz"},
        "h.io:5000": {"auth": "ZDo0"}}}"#;
    for (registry, repository, user) in [
        ("h.io", "z", "a"),
        ("h.io", "xx", "a"),
        ("h.io", "x", "b"),
        ("h.io", "x/z", "b"),
        ("h.io", "x/y", "c"),
        ("h.io", "x/y/z", "c"),
        ("h.io:5000", "x/y", "d"),
    ] {
        match find(&[file], registry, repository).await.unwrap() {
            Some(Credentials::Password { user: found, .. }) => assert_eq!(found, user, "{registry}/{repository}"),
            other => panic!("{registry}/{repository}: {other:?}"),
        }
    }
    assert_eq!(find(&[file], "other.io", "x").await.unwrap(), None);
}

#[tokio::test]
async fn docker_keys_and_forms() {
    for key in ["https://index.docker.io/v1/", "docker.io", "index.docker.io/v1/", "registry-1.docker.io"] {
        let file = format!(r#"{{"auths": {{"{key}": {{"auth": "dTpwOnE="}}}}}}"#);
        assert_eq!(find(&[&file], "docker.io", "library/a").await.unwrap(), password("u", "p:q"), "{key}");
    }
    let file = r#"{"auths": {"https://h.io/v2/": {"username": "u", "password": "p"}}}"#;
    assert_eq!(find(&[file], "h.io", "a").await.unwrap(), password("u", "p"));
    let file = r#"{"auths": {"h.io": {"auth": "dTp4", "identitytoken": "T"}}}"#;
    let identity = Some(Credentials::Identity { token: "T".to_owned() });
    assert_eq!(find(&[file], "h.io", "a").await.unwrap(), identity);
    assert_eq!(find(&[r#"{"auths": {"h.io": {"auth": "dTp4AAA"}}}"#], "h.io", "a").await.unwrap(), password("u", "x"));
}

#[tokio::test]
async fn the_first_file_with_an_answer_wins() {
    let first = r#"{"auths": {"a.io": {"auth": "dTox"}, "b.io": {}}}"#;
    let second = r#"{"auths": {"a.io": {"auth": "dToy"}, "b.io": {"auth": "dToz"}}}"#;
    assert_eq!(find(&["", first, second], "a.io", "x").await.unwrap(), password("u", "1"));
    assert_eq!(find(&["", first, second], "b.io", "x").await.unwrap(), password("u", "3"));
}

#[tokio::test]
async fn bad_files_are_named_and_never_quoted() {
    for bad in ["SECRET", r#"{"auths": "SECRET"}"#, r#"{"auths": {"h.io": {"auth": "SECRET!"}}}"#] {
        let error = find(&[bad], "h.io", "x").await.unwrap_err();
        assert!(error.to_string().contains("0.json"), "{error}");
        assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
    }
    let missing = named("/nonexistent/auth.json").find("h.io", "x").await.unwrap_err();
    assert!(missing.to_string().starts_with("cannot read credentials from /nonexistent/auth.json: "), "{missing}");
    assert_eq!(named("/dev/null").find("h.io", "x").await.unwrap(), None);
    assert!(!format!("{:?}", password("u", "SECRET")).contains("SECRET"));
}

#[test]
fn the_usual_places_in_order() {
    let found = |set: &'static [(&str, &str)], user: u32, options: ClientOptions| {
        let variable =
            move |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value));
        let chosen = CredentialFiles::of(&options, variable, user);
        (chosen.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" "), chosen.required)
    };
    let usual = |set, user| found(set, user, ClientOptions::default());
    let places = |files: &str| (files.to_owned(), false);
    let only = |file: &str| (file.to_owned(), true);

    let expected = places("/run/containers/7/auth.json /h/.config/containers/auth.json /h/.docker/config.json");
    assert_eq!(usual(&[("HOME", "/h")], 7), expected);
    let set = &[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/x"), ("XDG_CONFIG_HOME", "/c"), ("DOCKER_CONFIG", "/d")];
    assert_eq!(usual(set, 7), places("/x/containers/auth.json /c/containers/auth.json /d/config.json"));
    // A service of root's has no HOME.
    let expected = "/run/containers/0/auth.json HOME/.config/containers/auth.json HOME/.docker/config.json";
    assert_eq!(usual(&[], 0), places(&expected.replace("HOME", "/root")));
    assert_eq!(usual(&[("HOME", "/h")], 0).0.split(' ').next_back(), Some("/h/.docker/config.json"));
    assert_eq!(usual(&[], 7), places("/run/containers/7/auth.json"));
    // What is named wins over what is set, and one file over several.
    let set = &[("REGISTRY_AUTH_FILE", "/r"), ("HOME", "/h")];
    assert_eq!(usual(set, 0), only("/r"));
    let callers = ClientOptions { credential_files: vec!["/a".into(), "/b".into()], ..ClientOptions::default() };
    assert_eq!(found(set, 0, callers.clone()), places("/a /b"));
    assert_eq!(found(set, 0, ClientOptions { auth_file: Some("/f".into()), ..callers }), only("/f"));
}

#[tokio::test]
async fn helper_names_are_checked() {
    for name in ["../x", "a b", "a/b", "a;b"] {
        let file = format!(r#"{{"credHelpers": {{"h.io": "{name}"}}}}"#);
        let error = find(&[&file], "h.io", "x").await.unwrap_err();
        assert!(error.to_string().contains("is not the name of a credential helper"), "{error}");
    }
    let file = r#"{"credsStore": "ublkimg-absent"}"#;
    let error = find(&[file], "h.io", "x").await.unwrap_err();
    let expected = "docker-credential-ublkimg-absent has no answer for h.io: ";
    assert!(error.to_string().starts_with(expected), "{error}");
}
