//! Tar archives for tests, written by hand so that every oddity can be had.

/// An archive under construction.
#[derive(Default)]
pub(crate) struct TarBuilder {
    bytes: Vec<u8>,
}

/// A header whose fields can be changed before it is added.
pub(crate) struct HeaderBuilder {
    block: [u8; 512],
}

impl HeaderBuilder {
    pub(crate) fn new(kind: u8, path: &str) -> Self {
        let mut header = Self { block: [0; 512] };
        header.set(0, path.as_bytes());
        header.set(100, b"0000644\0");
        header.set(108, b"0000000\0");
        header.set(116, b"0000000\0");
        header.set(124, b"00000000000\0");
        header.set(136, b"00000000000\0");
        header.set(156, &[kind]);
        header.set(257, b"ustar\x0000");
        header
    }

    /// GNU magic instead of ustar.
    pub(crate) fn gnu(mut self) -> Self {
        self.set(257, b"ustar  \0");
        self
    }

    pub(crate) fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.block[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.set(100, format!("{mode:07o}\0").as_bytes());
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.set(108, format!("{uid:07o}\0").as_bytes());
        self.set(116, format!("{gid:07o}\0").as_bytes());
        self
    }

    pub(crate) fn size(mut self, size: u64) -> Self {
        self.set(124, format!("{size:011o}\0").as_bytes());
        self
    }

    pub(crate) fn mtime(mut self, mtime: u64) -> Self {
        self.set(136, format!("{mtime:011o}\0").as_bytes());
        self
    }

    pub(crate) fn link(mut self, target: &str) -> Self {
        self.set(157, target.as_bytes());
        self
    }

    pub(crate) fn device(mut self, major: u32, minor: u32) -> Self {
        self.set(329, format!("{major:07o}\0").as_bytes());
        self.set(337, format!("{minor:07o}\0").as_bytes());
        self
    }

    pub(crate) fn finish(mut self) -> [u8; 512] {
        self.set(148, b"        ");
        let sum: u32 = self.block.iter().map(|byte| u32::from(*byte)).sum();
        self.set(148, format!("{sum:06o}\0 ").as_bytes());
        self.block
    }
}

impl TarBuilder {
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A header and its data, padded.
    pub(crate) fn entry(mut self, header: HeaderBuilder, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(&header.finish());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(HeaderBuilder::new(b'0', path).size(data.len() as u64), data)
    }

    pub(crate) fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(HeaderBuilder::new(b'5', path).mode(mode), b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(HeaderBuilder::new(b'2', path).mode(0o777).link(target), b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(HeaderBuilder::new(b'1', path).link(target), b"")
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.pax_of_kind(b'x', records)
    }

    /// A PAX header of kind `x` or `g`.
    pub(crate) fn pax_of_kind(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.entry(HeaderBuilder::new(kind, "pax").size(data.len() as u64), &data)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }

    /// Without the blocks that end an archive.
    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}

fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut len = rest.len() + 1;
    while len.to_string().len() + rest.len() != len {
        len += 1;
    }
    [len.to_string().as_bytes(), &rest].concat()
}
