//! What a conversion tells whoever watches it.

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Looking for layers that were converted before; counts what is read of them.
    Find,
    /// Reading a source layer; counts its bytes as stored at the source.
    Read,
    /// Compressing a layer blob; counts its raw bytes.
    Compress,
    /// Pushing a layer blob; counts its bytes.
    Push,
    /// Merging the trees of all layers and pushing what describes the image.
    Finish,
    /// Reading back a layer blob; counts its bytes.
    Check,
    /// Pushing a profile and listing it in the image's index.
    Publish,
}

/// A piece of work of one phase.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Task {
    /// What is done.
    pub phase: Phase,
    /// The layer it is done for, from 0, the base; `None` for the whole image.
    pub layer: Option<usize>,
    /// Number of layers of the image.
    pub layers: usize,
}

/// Hears of the progress of a conversion, from several threads at once. Layers overlap.
pub trait Progress: Send + Sync {
    /// `task` starts and will count to `total_bytes`, if that is known.
    fn start(&self, task: &Task, total_bytes: Option<u64>);
    /// `task` has done that many bytes more.
    fn advance(&self, task: &Task, bytes: u64);
    /// `task` is done. Not called for a task that failed.
    fn finish(&self, task: &Task);
}

/// Does not look.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _: &Task, _: Option<u64>) {}
    fn advance(&self, _: &Task, _: u64) {}
    fn finish(&self, _: &Task) {}
}
