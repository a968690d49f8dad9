//! docs/json.md says what `--json` prints: every field that is printed is in its tables, with its type, and every field of the
//! tables is printed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::Auth;
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::skip;

/// Fields that are there only while a registry is in trouble.
const IN_TROUBLE: &str = "waiting.";

/// The fields that the page has for a command, with their types.
fn documented(command: &str) -> BTreeMap<String, Vec<String>> {
    let page = include_str!("../../docs/json.md");
    let heading = format!("## `{command}`\n");
    let section = page.split_once(&heading).unwrap_or_else(|| panic!("no {command}")).1;
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let row = |line: &str| {
        let (field, rest) = line.split_once("` | ").unwrap();
        let types = rest.split(" |").next().unwrap();
        (field.to_owned(), types.split(" or ").map(str::to_owned).collect())
    };
    rows.map(row).collect()
}

fn walk(path: &str, value: &Value, found: &mut BTreeSet<(String, &'static str)>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !path.is_empty() {
        found.insert((path.to_owned(), kind));
    }
    match value {
        Value::Array(all) => all.iter().for_each(|one| walk(&format!("{path}[]"), one, found)),
        Value::Object(all) => all.iter().for_each(|(name, one)| {
            walk(&if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, one, found);
        }),
        _ => {}
    }
}

/// Holds the page against what a command has printed, in one or several states of the system.
fn check(command: &str, printed: &[String]) {
    let documented = documented(command);
    let mut found = BTreeSet::new();
    for text in printed {
        walk("", &serde_json::from_str(text).unwrap(), &mut found);
    }
    for (path, kind) in &found {
        let types = documented.get(path).unwrap_or_else(|| panic!("{command}: {path} is not in docs/json.md"));
        assert!(types.iter().any(|known| known == kind), "{command}: {path} is a {kind}, not {types:?}");
    }
    let missing = documented.keys().filter(|path| !path.starts_with(IN_TROUBLE));
    let missing: Vec<_> = missing.filter(|path| !found.iter().any(|(found, _)| found == *path)).collect();
    assert!(missing.is_empty(), "{command}: docs/json.md has what is not printed: {missing:?}");
}

#[test]
fn what_is_printed_is_what_the_page_says() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    // With a verity tree, so that its fields are there.
    let host = Host::new(Auth::Anonymous);
    SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
    let [source, converted] = ["source", "converted"].map(|name| host.root.join(name));
    let [from, to] = [&source, &converted].map(|layout| format!("oci:{}:v1", layout.display()));
    host.ublkimg(&["convert", "--verity", &from, &to]).success();
    host.registry.load_layout(&converted, Some("v1"), "sample", "v1").unwrap();
    let reference = host.registry.reference("sample", "v1");
    let trace = host.root.join("start.trace");
    let trace = trace.to_str().unwrap();
    let printed = |arguments: &[&str]| host.ublkimg(arguments).success().stdout;
    let attach = || {
        let mount = host.root.join("mnt");
        let options = ["--mount", mount.to_str().unwrap(), "--read-timeout", "5s", "--command", "cat"];
        host.add("sample", &options).success();
        std::fs::read(mount.join("data/noise")).unwrap();
        host.ublkimg(&["ready", "sample-v1"]).success();
    };
    attach();
    let recorded = printed(&["status", "--json", "sample-v1"]);
    host.ublkimg(&["record", "stop", "sample-v1", "-o", trace]).success();
    host.ublkimg(&["rm", "sample-v1"]).success();
    host.ublkimg(&["optimize", &reference, "--trace", trace, "--default"]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    std::fs::remove_dir_all(host.root.join("store")).unwrap();
    attach();
    check("ublkimg status --json", &[recorded, printed(&["status", "--json", "sample-v1"])]);
    check("ublkimg inspect --json", &[printed(&["inspect", "--json", &reference])]);
    let of_image = printed(&["trace", "show", "--json", "--image", &reference, trace]);
    check("ublkimg trace show --json", &[printed(&["trace", "show", "--json", trace]), of_image]);
    host.end();
}
