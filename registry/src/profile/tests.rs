use super::*;
use crate::descriptor::{Index, MEDIA_TYPE_INDEX, Platform};
use crate::erofs_manifest;

fn digest(nibble: char) -> Digest {
    format!("sha256:{}", nibble.to_string().repeat(64)).parse().unwrap()
}

fn image() -> Digest {
    digest('a')
}

fn sample(name: Option<&str>, command: Option<char>) -> ProfileManifest {
    ProfileManifest {
        subject: Descriptor::new(MEDIA_TYPE_MANIFEST, image(), 400),
        command: command.map(digest),
        name: name.map(str::to_owned),
        trace: ProfileManifest::describe_trace(b"trace", true),
        hot: Some(HotRef {
            blob: Descriptor::new(MEDIA_TYPE_HOT, digest('7'), 9000),
            table: Bytes::from_static(b"table"),
        }),
        annotations: BTreeMap::from([("x".to_owned(), "y".to_owned())]),
    }
}

/// The bytes of a manifest with this text replaced.
fn altered(from: &str, to: &str) -> Vec<u8> {
    let text = String::from_utf8(sample(Some("web"), Some('c')).to_bytes().unwrap().to_vec()).unwrap();
    assert!(text.contains(from), "{text}");
    text.replacen(from, to, 1).into_bytes()
}

#[test]
fn what_is_built_is_what_is_read() {
    for profile in
        [sample(Some("web"), Some('c')), sample(None, None), ProfileManifest { hot: None, ..sample(None, None) }]
    {
        let bytes = profile.to_bytes().unwrap();
        assert_eq!(ProfileManifest::parse(&bytes).unwrap(), profile);
        assert_eq!(profile.to_bytes().unwrap(), bytes);
        let config = profile.config();
        assert_eq!(config.inline().unwrap().unwrap(), profile.config_bytes());
    }
}

#[test]
fn a_short_trace_travels_inside_unless_a_hot_blob_does_the_work() {
    assert_eq!(ProfileManifest::describe_trace(b"t", false).inline().unwrap().unwrap(), "t");
    assert_eq!(ProfileManifest::describe_trace(b"t", true).data, None);
    assert_eq!(ProfileManifest::describe_trace(&vec![1; TRACE_INLINE_MAX + 1], false).data, None);
}

#[test]
fn what_breaks_a_rule_is_refused() {
    let kind = |bytes: &[u8]| ProfileManifest::parse(bytes).unwrap_err().kind();
    assert_eq!(kind(&altered(ARTIFACT_TYPE, "application/x")), ErrorKind::NotOurs);
    assert_eq!(
        kind(br#"{"schemaVersion":2,"config":{"mediaType":"m","digest":"x","size":1},"layers":[]}"#),
        ErrorKind::Invalid
    );
    for (from, to) in [
        (MEDIA_TYPE_TRACE, "application/x"),
        (MEDIA_TYPE_HOT, "application/x"),
        (MEDIA_TYPE_TABLE, "application/x"),
        ("\"size\":9000", "\"size\":8589934593"),
        ("\"size\":9000", "\"size\":0"),
        ("\"size\":9000", "\"size\":-1"),
        (r#","data":"dGFibGU=""#, ""),
        (r#""size":5,"data""#, r#""size":1048577,"data""#),
        ("\"web\"", "\"a b\""),
        ("\"web\"", "\"auto\""),
        (&"c".repeat(64), "c"),
        ("\"subject\"", "\"sub\""),
        (
            "\"layers\":[",
            r#""layers":[{"mediaType":"application/vnd.ublkimg.trace.v1+zstd","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1},"#,
        ),
    ] {
        assert_eq!(kind(&altered(from, to)), ErrorKind::Invalid, "{from} {to}");
    }
    assert_eq!(kind(&altered("dGFibGU=", "dGFibGV=")), ErrorKind::Corrupt);
    assert_eq!(kind(&altered("dGFibGU=", "dGFibGF=")), ErrorKind::Corrupt);
    let mut large = sample(None, None);
    large.hot.as_mut().unwrap().table = vec![0; INLINE_BYTES_MAX + 1].into();
    assert_eq!(large.to_bytes().unwrap_err().kind(), ErrorKind::Invalid);
    assert!(sample(Some("none"), None).to_bytes().is_err());
}

#[test]
fn names_are_words() {
    for name in ["web", "a", "3.11", "x_y-z+1", &"n".repeat(64)] {
        assert!(check_name(name).is_ok(), "{name}");
    }
    for name in ["", "auto", "none", "-x", ".x", "a b", "a/b", "a:b", "\u{e9}", "a\n", &"n".repeat(65)] {
        assert!(check_name(name).is_err(), "{name}");
    }
}

const FOREIGN: &str = "\n  { \"size\": 1, \"new\":[1.50, {\"}\":1e400}], \"mediaType\":\"m\", \"digest\":\
    \"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\"}";

/// An index as another tool could write it.
fn index() -> String {
    let image = image();
    format!(
        "{{ \"x\": {{\"manifests\":[1]}}, \"schemaVersion\":2,\"manifests\": [{FOREIGN} ,\n {{\"mediaType\":\"m\",\"digest\":\"{image}\",\
         \"size\":400,\"platform\":{{\"os\":\"linux\",\"architecture\":\"amd64\",\"os.features\":[\"erofs\"]}}}}\n], \"tail\": 7 }}\n"
    )
}

fn add(index: &[u8], name: Option<&str>, command: Option<char>, is_default: bool) -> Bytes {
    add_to_index(index, &sample(name, command).to_bytes().unwrap(), is_default).unwrap()
}

fn names(index: &[u8]) -> Vec<String> {
    let listed = profiles(index, &image()).unwrap();
    let name = |profile: &ListedProfile| {
        format!("{}{}", profile.name.as_deref().unwrap_or("-"), if profile.is_default { "*" } else { "" })
    };
    listed.iter().map(name).collect()
}

#[test]
fn an_index_keeps_every_byte_of_others() {
    let before = index();
    let after = add(before.as_bytes(), Some("web"), Some('c'), true);
    let after = String::from_utf8(after.to_vec()).unwrap();
    let (head, tail) = before.split_at(before.find("\n], \"tail\"").unwrap());
    let added = after.strip_prefix(head).unwrap().strip_suffix(tail).unwrap();
    let listed: Descriptor = serde_json::from_str(added.strip_prefix(',').unwrap()).unwrap();
    assert_eq!(listed.platform, Some(Platform::new("unknown", "unknown")));
    assert_eq!(listed.inline().unwrap().unwrap(), sample(Some("web"), Some('c')).to_bytes().unwrap());
    assert_eq!(listed.annotations["x"], "y");
    let listed = profiles(after.as_bytes(), &image()).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].command, listed[0].trust), (Some(digest('c')), Trust::Bytes));
    assert_eq!(profiles(after.as_bytes(), &digest('b')).unwrap(), [], "another image of the index");
    assert_eq!(add(after.as_bytes(), Some("web"), Some('c'), true), after, "again");
}

#[test]
fn a_profile_takes_the_place_of_its_rivals() {
    let mut index = Bytes::from(index());
    for (name, command) in [("one", 'c'), ("two", 'd'), ("three", 'e')] {
        index = add(&index, Some(name), Some(command), true);
    }
    assert_eq!(names(&index), ["one", "two", "three*"]);
    assert_eq!(names(&add(&index, Some("new"), Some('d'), false)), ["one", "new", "three*"], "same command");
    assert_eq!(names(&add(&index, Some("one"), Some('f'), true)), ["one*", "two", "three"], "same name");
    let both = add(&index, Some("one"), Some('e'), false);
    assert_eq!(names(&both), ["one", "two"], "the name of one, the command of another");
    assert!(both.windows(FOREIGN.len()).any(|window| window == FOREIGN.as_bytes()));
    assert_eq!(names(&add(&index, None, None, false)), ["one", "two", "three*", "-"]);
}

#[test]
fn other_images_keep_their_profiles() {
    let mut index = add(index().as_bytes(), Some("web"), Some('c'), true);
    let other = ProfileManifest {
        subject: Descriptor::new(MEDIA_TYPE_MANIFEST, digest('b'), 1),
        ..sample(Some("web"), Some('c'))
    };
    index = add_to_index(&index, &other.to_bytes().unwrap(), true).unwrap();
    assert_eq!(names(&index), ["web*"]);
    assert_eq!(profiles(&index, &digest('b')).unwrap().len(), 1);
}

#[test]
fn what_cannot_be_edited_is_refused() {
    let profile = sample(None, None).to_bytes().unwrap();
    let kind = |index: &str| add_to_index(index.as_bytes(), &profile, false).unwrap_err().kind();
    let text = index();
    for bad in [
        "{",
        &text.replace(&image().to_string(), &digest('9').to_string()),
        &text.replace("\"manifests\": ", "\"m\\u0061nifests\":"),
    ] {
        assert_eq!(kind(bad), ErrorKind::Invalid, "{bad}");
    }
    let full = text.replace("\"tail\": 7", &format!("\"tail\": \"{}\"", "x".repeat(crate::MAX_MANIFEST_BYTES)));
    assert_eq!(kind(&full), ErrorKind::TooLarge);
    assert!(add_to_index(text.as_bytes(), b"{}", false).is_err());
}

#[test]
fn a_large_profile_is_only_named() {
    let mut profile = sample(None, None);
    profile.hot.as_mut().unwrap().table = vec![1; 40_000].into();
    let index = add_to_index(index().as_bytes(), &profile.to_bytes().unwrap(), false).unwrap();
    assert_eq!(profiles(&index, &image()).unwrap()[0].descriptor.data, None);
    assert!(index.len() < 2_000, "{}", index.len());
}

#[test]
fn the_profile_is_chosen_by_command_then_default() {
    let mut index = Bytes::from(index());
    for (name, command, is_default) in [("one", 'c', false), ("two", 'd', true), ("three", 'e', false)] {
        index = add(&index, Some(name), Some(command), is_default);
    }
    let listed = profiles(&index, &image()).unwrap();
    let chosen = |choice: &str, command: Option<char>| {
        let chosen = choose_profile(&listed, &choice.parse().unwrap(), command.map(digest).as_ref());
        chosen.map(|found| found.map(|profile| profile.name.clone().unwrap()))
    };
    assert_eq!(chosen("auto", Some('e')).unwrap().as_deref(), Some("three"));
    assert_eq!(chosen("auto", Some('f')).unwrap().as_deref(), Some("two"));
    assert_eq!(chosen("auto", None).unwrap().as_deref(), Some("two"));
    assert_eq!(chosen("none", Some('e')).unwrap(), None);
    assert_eq!(chosen("one", Some('e')).unwrap().as_deref(), Some("one"));
    assert_eq!(chosen(&listed[2].descriptor.digest.to_string(), None).unwrap().as_deref(), Some("three"));
    let error = chosen("four", None).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().ends_with("no profile four; it has one, two, three")),
        (ErrorKind::NotFound, true),
        "{error}"
    );
    assert_eq!(choose_profile(&[], &ProfileChoice::Auto, Some(&digest('c'))).unwrap(), None);
    assert!("a b".parse::<ProfileChoice>().is_err() && "sha256:1".parse::<ProfileChoice>().is_err());
}

#[test]
fn no_image_is_chosen_among_profiles() {
    let index = add(index().as_bytes(), Some("web"), Some('c'), true);
    let amd64 = Platform::new("linux", "amd64");
    assert_eq!(erofs_manifest::choose(&index, &amd64).unwrap().digest, image());
    // Whatever it claims.
    let mut listed: Index = serde_json::from_slice(&index).unwrap();
    listed.media_type = Some(MEDIA_TYPE_INDEX.to_owned());
    listed.manifests[2].platform = listed.manifests[1].platform.clone();
    listed.manifests.remove(1);
    let error = erofs_manifest::choose(&serde_json::to_vec(&listed).unwrap(), &amd64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotOurs);
}

/// A text with some of its bytes replaced, as somebody hostile could send it.
fn spoiled(text: &[u8], changes: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for (at, byte) in changes {
        let at = at % bytes.len();
        bytes[at] = *byte;
    }
    bytes
}

fn changes() -> impl proptest::strategy::Strategy<Value = Vec<(usize, u8)>> {
    use proptest::prelude::*;
    proptest::collection::vec(
        (any::<usize>(), prop_oneof![Just(b'"'), Just(b'{'), Just(b'['), Just(b'\\'), any::<u8>()]),
        0..4,
    )
}

proptest::proptest! {
    #[test]
    fn any_manifest_is_read_or_refused(changes in changes()) {
        let bytes = spoiled(&sample(Some("web"), Some('c')).to_bytes().unwrap(), &changes);
        if let Ok(profile) = ProfileManifest::parse(&bytes) {
            proptest::prop_assert_eq!(ProfileManifest::parse(&profile.to_bytes().unwrap()).unwrap(), profile);
        }
    }

    #[test]
    fn any_index_is_edited_or_refused(changes in changes()) {
        let before = spoiled(&add(index().as_bytes(), Some("one"), Some('d'), true), &changes);
        let profile = sample(Some("web"), Some('c')).to_bytes().unwrap();
        if let Ok(after) = add_to_index(&before, &profile, true) {
            let listed = profiles(&after, &image()).unwrap();
            let ours: Vec<_> = listed.iter().filter(|listed| listed.is_default).collect();
            proptest::prop_assert_eq!(ours.len(), 1);
            proptest::prop_assert_eq!(&ours[0].descriptor.digest, &Digest::of(&profile));
            proptest::prop_assert_eq!(add_to_index(&after, &profile, true).unwrap(), after);
        }
    }
}
