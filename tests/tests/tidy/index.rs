//! docs/README.md leads to every page.

use crate::repository::{files, read};

#[test]
fn every_page_is_in_the_index() {
    let index = read("docs/README.md");
    let pages = files(&["md"]).into_iter().filter_map(|file| Some(file.strip_prefix("docs/")?.to_owned()));
    let (mut count, mut missing) = (0, Vec::new());
    for page in pages.filter(|page| page != "README.md") {
        count += 1;
        if !index.contains(&format!("({page})")) {
            missing.push(page);
        }
    }
    assert_eq!(missing, Vec::<String>::new());
    assert!(count > 10, "{count} pages");
}
