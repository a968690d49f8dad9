//! From container image layers to layer blobs and a merged metadata image.
//!
//! [`convert()`] reads an image from a registry, an OCI layout, an archive or a directory, and pushes the same image in a
//! form that can be served lazily: one layer blob for each layer, one metadata blob for all of them, a manifest and an
//! index. Per layer the bytes flow once, front to back, with bounded memory:
//!
//! ```text
//! source ─► SHA-256 ─► gunzip/unzstd ─► SHA-256 ─► tar ─► tree ────────► EROFS metadata ─┐
//!           (digest)                    (diff id)   └──► contents: spool file ─► chunks ─┴─► zstd frames ─► blob ─► push
//! ```
//! Then the trees of all layers, read back from their metadata, are merged, and the tag moves last. Everything on disk
//! on the way is in files without a name, so an error or a kill leaves nothing behind; blobs that were pushed already
//! are referred to by nothing.
//!
//! [`optimize()`] makes a profile of recorded starts of such an image and lists it beside the image; it reads few chunks and
//! writes no layer.
//!
//! Layers that were converted before are used again, here or in the registry: [`reuse`].
//!
//! [`check()`] reads a whole image back, [`export()`] writes it as a file that needs nothing of this project, [`unpack()`] pulls an
//! ordinary image as container engines do.
//!
//! **Nothing is guessed.** A layer must have the digest that the manifest and the config say, and an archive that can be
//! read in two ways is an error. **Same input, same bytes:** no clock, no randomness, no map order, no number of threads
//! shows in what is pushed.

#![forbid(unsafe_code)]

mod background;
mod blob;
mod check;
mod chunk;
mod chunk_size;
mod compression;
mod config;
mod convert;
mod converted_layer;
mod destination;
mod error;
mod export;
mod frames;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hashing;
mod layer;
mod merge;
mod optimize;
mod path;
mod place;
mod progress;
mod read_layer;
mod reuse;
mod source;
mod spool;
mod stored_image;
mod tar;
mod trace_file;
mod unnamed_file;
mod unpack;

pub use check::{CheckOptions, CheckedImage, check};
pub use chunk_size::ChunkSize;
pub use convert::{ImageSummary, LayerSummary, Options, Summary, convert};
pub use error::{Error, ErrorKind, Result};
pub use export::{export, export_file};
pub use optimize::{Dropped, HotSummary, OptimizeOptions, Optimized, fit_trace, optimize};
pub use progress::{NoProgress, Phase, Progress, Task};
pub use source::{Platforms, Source};
pub use stored_image::StoredImage;
pub use trace_file::{load_trace, store_trace};
pub use unpack::{Unpacked, unpack};
