//! A source layer, read once: its tree, its contents in a spool, and proof that it is the layer it should be.

use std::io::{self, Read};

use ublkimg_image::Sha256;

use crate::compression::Decompressor;
use crate::error::{Error, ErrorKind, Result};
use crate::hashing::HashingReader;
use crate::layer::{Layer, read_directory, read_tar};
use crate::source::{LayerInput, SourceLayer};
use crate::spool::Spool;

/// What reading a layer tells.
pub(crate) struct ReadLayer {
    /// Bytes as they are stored; of the files of a directory.
    pub(crate) len_bytes: u64,
    /// Digest of its bytes uncompressed; `None` for a directory.
    pub(crate) diff_id: Option<Sha256>,
    pub(crate) tree: Layer,
}

/// Reads a layer. `advance` hears of the bytes read and can stop it.
///
/// # Errors
/// `VerificationFailed` when it does not have the digests that `layer` states; `BadSource`, `Unsupported`; those of the source
/// and of the spool.
pub(crate) fn read_layer(
    input: LayerInput,
    layer: &SourceLayer,
    spool: &mut Spool,
    advance: &dyn Fn(u64) -> Result<()>,
) -> Result<ReadLayer> {
    match input {
        LayerInput::Stream(stream) => {
            let mut raw = HashingReader::new(Watched { inner: stream, advance });
            let (tree, diff_id) = read_stream(&mut raw, layer, spool)?;
            Ok(ReadLayer { len_bytes: raw.len_bytes(), diff_id: Some(diff_id), tree })
        }
        LayerInput::Directory(path) => {
            let read = std::cell::Cell::new(0);
            let advance = |bytes| {
                read.set(read.get() + bytes);
                advance(bytes)
            };
            let tree = read_directory(&path, spool, &advance)?;
            Ok(ReadLayer { len_bytes: read.get(), diff_id: None, tree })
        }
    }
}

/// Unpacks a layer and checks its digests.
fn read_stream(raw: &mut HashingReader<impl Read>, layer: &SourceLayer, spool: &mut Spool) -> Result<(Layer, Sha256)> {
    let tree = unpack(raw, spool);
    if tree.as_ref().is_err_and(|error| error.kind() != ErrorKind::BadSource) {
        return tree;
    }
    // Bytes that make no sense may have come to harm on the way: then it is their digest that is wrong. Either way all
    // of the layer must have been seen.
    io::copy(raw, &mut io::sink()).map_err(|error| Error::io("reading the layer", error))?;
    if let Some(expected) = layer.digest
        && raw.digest().0 != expected.0
    {
        let message = format!("its bytes have the digest {}", raw.digest());
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    let (tree, diff_id) = tree?;
    if let Some(expected) = layer.diff_id
        && diff_id != expected
    {
        let message = format!("uncompressed it has the digest {diff_id}, but the config says {expected}");
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    Ok((tree, diff_id))
}

/// The tree of a layer, and the digest of its bytes uncompressed.
fn unpack(raw: &mut dyn Read, spool: &mut Spool) -> Result<(Layer, Sha256)> {
    let mut unpacked = HashingReader::new(Decompressor::new(raw)?);
    let tree = read_tar(&mut unpacked, spool)?;
    Ok((tree, unpacked.digest()))
}

/// A source that tells what is read of it.
struct Watched<'a, R> {
    inner: R,
    advance: &'a dyn Fn(u64) -> Result<()>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        (self.advance)(count as u64)?;
        Ok(count)
    }
}
