//! What a store under test did to its disk, step by step, and the trouble that the disk makes for it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use parking_lot::Mutex;

/// A change, or a promise of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Create,
    Write {
        offset_bytes: u64,
        bytes: Vec<u8>,
    },
    SetLen(u64),
    Punch(Range<u64>),
    /// What the file held when the journal had `began` steps is on the disk.
    Sync {
        began: usize,
    },
    /// The names that the directory had then are.
    SyncDirectory {
        began: usize,
    },
    Rename {
        to: PathBuf,
    },
    Remove,
}

/// Says whether writing or syncing a file fails, and how.
pub(crate) type Trouble = fn(&Path) -> Option<rustix::io::Errno>;

#[derive(Default)]
struct Journal {
    /// None unless they are kept.
    steps: Option<Vec<(PathBuf, Step)>>,
    trouble: Option<Trouble>,
}

/// Journals by the root of their store.
static JOURNALS: Mutex<BTreeMap<PathBuf, Journal>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// What else happens while this thread is at work on a disk: before each step and after it.
    static MEANWHILE: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

/// Sets what else happens.
pub(crate) fn set_meanwhile(meanwhile: Option<Rc<dyn Fn()>>) {
    MEANWHILE.set(meanwhile);
}

fn meanwhile() {
    let meanwhile = MEANWHILE.with_borrow(Clone::clone);
    if let Some(meanwhile) = meanwhile {
        meanwhile();
    }
}

fn with<T: Default>(path: &Path, look: impl FnOnce(&mut Journal) -> T) -> T {
    let mut journals = JOURNALS.lock();
    journals.iter_mut().find(|(root, _)| path.starts_with(root)).map_or_else(T::default, |(_, journal)| look(journal))
}

/// From now on the steps of the store under `root` are kept.
pub(super) fn begin(root: &Path) {
    JOURNALS.lock().insert(root.to_owned(), Journal { steps: Some(Vec::new()), trouble: None });
}

/// Takes the steps.
pub(super) fn end(root: &Path) -> Vec<(PathBuf, Step)> {
    JOURNALS.lock().remove(root).and_then(|journal| journal.steps).unwrap_or_default()
}

/// What the disk of the store under `root` makes of writes and syncs from now on.
pub(crate) fn set_trouble(root: &Path, trouble: Option<Trouble>) {
    JOURNALS.lock().entry(root.to_owned()).or_default().trouble = trouble;
}

pub(super) fn len(path: &Path) -> usize {
    with(path, |journal| journal.steps.as_ref().map_or(0, Vec::len))
}

pub(super) fn may_fail(path: &Path) -> io::Result<()> {
    meanwhile();
    with(path, |journal| journal.trouble).and_then(|trouble| trouble(path)).map_or(Ok(()), |errno| Err(errno.into()))
}

pub(super) fn note(path: &Path, step: Step) -> io::Result<()> {
    with(path, |journal| {
        if let Some(steps) = &mut journal.steps {
            steps.push((path.to_owned(), step));
        }
    });
    meanwhile();
    Ok(())
}

/// Nothing is known of the store under `root` any more.
pub(crate) fn forget(root: &Path) {
    JOURNALS.lock().remove(root);
}
