//! The files of the repository.

use std::path::{Path, PathBuf};

/// Directories that hold what is built or downloaded.
const NOT_OURS: [&str; 2] = ["target", ".git"];

/// Where the workspace lies.
pub(crate) fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap().to_owned()
}

/// All files whose name ends with one of these extensions, or is one of them, as paths from the root.
pub(crate) fn files(extensions: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    walk(&root(), &mut |path| {
        let name = path.file_name().unwrap().to_string_lossy();
        let extension = path.extension().map(|extension| extension.to_string_lossy());
        if extensions.iter().any(|wanted| name == *wanted || extension.as_deref() == Some(wanted)) {
            found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
        }
    });
    assert!(!found.is_empty(), "no file with {extensions:?} under {}", root().display());
    found.sort();
    found
}

fn walk(dir: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() && !NOT_OURS.iter().any(|name| entry.file_name() == *name) {
            walk(&entry.path(), visit);
        } else if kind.is_file() {
            visit(&entry.path());
        }
    }
}

/// A file of the repository.
pub(crate) fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap()
}
