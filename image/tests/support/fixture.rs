//! One fixed tree with everything that is easy to get wrong, and the data that its files refer to.

use std::collections::BTreeMap;

use ublkimg_image::{
    BLOCK_SIZE, DataBlock, DeviceNumber, FileData, FileLayout, Kind, Meta, Node, NodeId, Space, Time, Tree,
};

/// A tree and the bytes of its data spaces.
pub(crate) struct Fixture {
    pub(crate) tree: Tree,
    /// Whole blocks, in the order in which the spaces were given.
    pub(crate) data: Vec<Vec<u8>>,
    spaces: Vec<Space>,
    /// State of the pseudo-random bytes.
    seed: u64,
}

impl Fixture {
    /// Files use the `spaces` in turn. Each begins with `reserved_blocks` that no file uses.
    pub(crate) fn new(spaces: &[Space], reserved_blocks: usize) -> Self {
        let mut root = meta(0o755);
        root.mtime = Time { seconds: 1_700_000_000, nanoseconds: 999_999_999 };
        root.xattrs.insert(b"user.root".to_vec(), b"yes".to_vec());
        let reserved = vec![0xEE; reserved_blocks * BLOCK_SIZE];
        let data = vec![reserved; spaces.len()];
        let mut fixture = Self { tree: Tree::new(root), data, spaces: spaces.to_vec(), seed: 1 };
        fixture.add_files();
        fixture.add_attributes();
        fixture.add_special();
        fixture.add_links();
        fixture.add_directories();
        fixture
    }

    /// The bytes of a file, by its layout.
    pub(crate) fn content(&self, file: &FileData) -> Vec<u8> {
        let mut content = match &file.layout {
            _ if file.size_bytes == 0 => Vec::new(),
            FileLayout::Contiguous(first) => self.bytes_from(*first).to_vec(),
            FileLayout::Chunked { chunk_blocks_log2, blocks } => {
                let len = BLOCK_SIZE << chunk_blocks_log2;
                let chunk = |block: &Option<DataBlock>| match block {
                    Some(first) => {
                        let mut bytes = self.bytes_from(*first).to_vec();
                        bytes.resize(len, 0);
                        bytes
                    }
                    None => vec![0; len],
                };
                blocks.iter().flat_map(chunk).collect()
            }
        };
        content.truncate(usize::try_from(file.size_bytes).unwrap());
        content
    }

    fn bytes_from(&self, first: DataBlock) -> &[u8] {
        let space = self.spaces.iter().position(|space| *space == first.space).unwrap();
        &self.data[space][first.block as usize * BLOCK_SIZE..]
    }

    fn add(&mut self, path: &str, kind: Kind) -> NodeId {
        self.add_with(path, meta(0o644), kind)
    }

    fn add_with(&mut self, path: &str, meta: Meta, kind: Kind) -> NodeId {
        self.add_bytes(path.as_bytes(), meta, kind)
    }

    fn add_bytes(&mut self, path: &[u8], meta: Meta, kind: Kind) -> NodeId {
        let id = self.tree.add(Node { meta, kind });
        self.link(path, id);
        id
    }

    fn link(&mut self, path: &[u8], id: NodeId) {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = slash.map_or((&b""[..], path), |slash| (&path[..slash], &path[slash + 1..]));
        let parent = self.tree.lookup(parent).unwrap();
        assert_eq!(self.tree.link(parent, name, id), None);
    }

    fn directory(&mut self, path: &str) -> NodeId {
        self.add_with(path, meta(0o755), Kind::Directory(BTreeMap::new()))
    }

    /// Stores pseudo-random bytes in the next space, padded to blocks with zeros.
    fn store(&mut self, len: usize) -> DataBlock {
        let turn = usize::try_from(self.seed % self.spaces.len() as u64).unwrap();
        let data = &mut self.data[turn];
        let block = u32::try_from(data.len() / BLOCK_SIZE).unwrap();
        for _ in 0..len {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            data.push(self.seed.to_be_bytes()[0]);
        }
        data.resize(data.len().next_multiple_of(BLOCK_SIZE), 0);
        DataBlock { space: self.spaces[turn], block }
    }

    fn file(&mut self, len: usize) -> Kind {
        let layout = FileLayout::Contiguous(self.store(len));
        Kind::File(FileData { size_bytes: len as u64, layout })
    }

    fn chunked(size_bytes: u64, chunk_blocks_log2: u8, blocks: Vec<Option<DataBlock>>) -> Kind {
        Kind::File(FileData { size_bytes, layout: FileLayout::Chunked { chunk_blocks_log2, blocks } })
    }

    fn add_files(&mut self) {
        self.directory("files");
        self.add("files/empty", Kind::File(FileData::EMPTY));
        for len in [1, 4095, 4096, 4097, 300_000] {
            let file = self.file(len);
            self.add(&format!("files/{len}"), file);
        }
        let (a, b, c) = (self.store(16_384), self.store(16_384), self.store(5000));
        // Out of order, shared within the file and with others, short at the end.
        self.add("files/chunks", Self::chunked(54_152, 2, vec![Some(b), Some(a), Some(b), Some(c)]));
        self.add("files/shared", Self::chunked(16_384, 2, vec![Some(a)]));
        self.add("files/same", Kind::File(FileData { size_bytes: 16_384, layout: FileLayout::Contiguous(a) }));
        self.add(
            "files/holes",
            Self::chunked(1 << 20, 2, {
                let mut blocks = vec![None; 64];
                blocks[3] = Some(a);
                blocks[40] = Some(b);
                blocks
            }),
        );
        self.add("files/all-hole", Self::chunked(100_001, 0, vec![None; 25]));
        let one = self.store(4096);
        let mut long_map = vec![Some(one); 3000]; // A map of 12,000 bytes spans blocks.
        long_map[2999] = Some(c);
        self.add("files/long-map", Self::chunked(2999 * 4096 + 904, 0, long_map));
    }

    fn add_attributes(&mut self) {
        self.directory("attributes");
        for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2755), ("none", 0), ("all", 0o7777)] {
            let file = self.file(10);
            self.add_with(&format!("attributes/{name}"), meta(mode), file);
        }
        self.add_with("attributes/sticky", meta(0o1777), Kind::Directory(BTreeMap::new()));
        let mut owned = meta(0o600);
        (owned.uid, owned.gid) = (70_000, 4_000_000_000);
        self.add_with("attributes/owner", owned, Kind::Fifo);
        for (name, seconds, nanoseconds) in [
            ("epoch", 0, 0),
            ("before-epoch", -1, 5),
            ("year-1901", -2_147_483_649, 1),
            ("year-2500", 16_725_225_600, 7),
        ] {
            let mut stamped = meta(0o644);
            stamped.mtime = Time { seconds, nanoseconds };
            self.add_with(&format!("attributes/{name}"), stamped, Kind::File(FileData::EMPTY));
        }
        let mut many = meta(0o644);
        many.xattrs = BTreeMap::from([
            (b"user.a".to_vec(), b"value".to_vec()),
            (b"user.empty".to_vec(), Vec::new()),
            (b"user.large".to_vec(), (0..=255).cycle().take(9001).collect()),
            (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
            (b"security.capability".to_vec(), b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()),
            (b"system.posix_acl_access".to_vec(), acl()),
        ]);
        let file = self.file(5000);
        self.add_with("attributes/xattrs", many, file);
        let mut directory = meta(0o755);
        directory.xattrs.insert(b"system.posix_acl_default".to_vec(), acl());
        directory.xattrs.insert([&b"user."[..], &[b'n'; 250]].concat(), b"long name".to_vec());
        self.add_with("attributes/xattr-directory", directory, Kind::Directory(BTreeMap::new()));
    }

    fn add_special(&mut self) {
        self.directory("special");
        let number = |major, minor| DeviceNumber { major, minor };
        self.add("special/null", Kind::CharDevice(number(1, 3)));
        self.add("special/whiteout", Kind::CharDevice(number(0, 0)));
        self.add("special/large", Kind::CharDevice(number(4095, 1_048_575)));
        self.add("special/block", Kind::BlockDevice(number(259, 300)));
        self.add("special/fifo", Kind::Fifo);
        self.add("special/socket", Kind::Socket);
    }

    fn add_links(&mut self) {
        self.directory("links");
        for len in [1, 59, 1000, 3900, 4000, 4031, 4032, 4033, 4095] {
            self.add(&format!("links/{len}"), Kind::Symlink(vec![b'x'; len]));
        }
        let mut large = meta(0o777);
        large.xattrs.insert(b"trusted.large".to_vec(), vec![1; 4000]);
        self.add_with("links/xattr", large, Kind::Symlink(b"target\xff".to_vec()));
        for (first, second) in [("files/4097", "links/hard"), ("links/59", "links/hard-link-to-link")] {
            let id = self.tree.lookup(first.as_bytes()).unwrap();
            self.link(second.as_bytes(), id);
            self.link(format!("{second}-again").as_bytes(), id);
        }
    }

    fn add_directories(&mut self) {
        self.directory("empty");
        self.directory("names");
        // All of them sort before or around "." and "..".
        for name in [&b"!"[..], b"#x", b"+", b"-", b".-", b"...", b".a", b"..a", b"\x01", b"\xff\xfe", b"A", b"~"] {
            self.add_bytes(&[b"names/", name].concat(), meta(0o644), Kind::Fifo);
        }
        for letter in b'a'..=b'z' {
            self.add_bytes(&[&b"names/"[..], &[letter; 255]].concat(), meta(0o644), Kind::Fifo);
        }
        self.directory("large");
        for number in 0..3000 {
            self.add(&format!("large/entry-{number}"), Kind::Fifo);
        }
        // Around one block exactly, with "." and ".." (27 bytes): all inline, too long to be inline, one block.
        for used in [4031, 4032, 4033, 4095, 4096, 4097] {
            let directory = format!("size-{used}");
            self.directory(&directory);
            let mut left: usize = used - 27;
            for letter in b'a'..=b'z' {
                let mut len = left.min(250 + 12);
                if left > len && left - len < 13 {
                    len -= 13; // Leave enough for the next entry.
                }
                if len > 0 {
                    let name = [directory.as_bytes(), b"/", &vec![letter; len - 12]].concat();
                    self.add_bytes(&name, meta(0o644), Kind::Fifo);
                    left -= len;
                }
            }
            assert_eq!(left, 0);
        }
        let mut path = String::from("deep");
        self.directory(&path);
        for _ in 0..100 {
            path.push_str("/d");
            self.directory(&path);
        }
        self.add(&format!("{path}/end"), Kind::Fifo);
    }
}

fn meta(mode: u16) -> Meta {
    let mtime = Time { seconds: 1_600_000_000, nanoseconds: 123_456_789 };
    Meta { mode, uid: 0, gid: 0, mtime, xattrs: BTreeMap::new() }
}

/// An access control list that the kernel accepts: owner rwx, user 1000 r, group r, mask r, others nothing.
fn acl() -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(0x01u16, 7u16, u32::MAX), (0x02, 4, 1000), (0x04, 4, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)]
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
