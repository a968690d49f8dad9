//! docs/guarantees.md names tests that exist, and enough faults.

use crate::repository::{files, read};

/// What stands between backquotes and names a test: `file.rs::test`, or a lane.
fn named(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|name| name.contains(".rs::") || name.starts_with("tests/vm/lanes/"))
}

#[test]
fn every_promise_names_tests_that_exist() {
    let text = read("docs/guarantees.md");
    let known = files(&["rs", "sh"]);
    let mut missing = Vec::new();
    for name in named(&text) {
        let (file, test) = name.split_once("::").unwrap_or((name, ""));
        let source = if known.iter().any(|known| known == file) { read(file) } else { String::new() };
        let is_there = if test.is_empty() { !source.is_empty() } else { source.contains(&format!("fn {test}()")) };
        if !is_there {
            missing.push(name);
        }
    }
    assert_eq!(missing, Vec::<&str>::new());
}

/// Each row of the table says what happens, after what time, and names a file that prints this row (`make faults`).
#[test]
fn forty_faults_have_an_outcome() {
    let text = read("docs/guarantees.md");
    let table = text.split("<!-- faults: begin -->").nth(1).unwrap().split("<!-- faults: end -->").next().unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| !line.is_empty()).collect();
    assert!(rows.len() >= 40, "{}", rows.len());
    for row in rows {
        let [_, what, outcome, took, test, _] = row.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
            panic!("not four columns: {row}")
        };
        assert!(!outcome.is_empty() && (took.ends_with(" ms") || took.ends_with(" s")), "{row}");
        let file = test.trim_matches('`').split("::").next().unwrap();
        assert!(read(file).contains(what), "{file} prints no row {what:?}");
    }
}
