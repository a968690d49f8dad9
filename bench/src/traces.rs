//! Directories of recorded starts.
//!
//! For each workload `NAME`: `NAME.json` (`workload`, `image_bytes`, `warm_seconds`); `NAME.ra0.run-X.csv.zst` and
//! `NAME.ra128.run-X.csv.zst` (`t_us,block,blocks`: first reads without and with the kernel's read-ahead, for the runs
//! `a`, `b`, ...); `NAME.chunks-256k.csv.zst` (`chunk,raw_bytes,zstd3_bytes`); `NAME.packed-frames.csv.zst`
//! (`frame,first_rank,pages,zstd3_bytes`: the blocks of `ra0.run-a` in first-use order).

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ublkimg_scheduler::simulate::{ChunkSize, FrameSize, RecordedRead};

/// A file may unpack to this much: ten times the largest recorded start.
const FILE_BYTES_MAX: usize = 16 << 20;

/// One recorded run: the reads as the program made them, and as the kernel's read-ahead made them.
#[derive(Debug, Clone)]
pub struct Run {
    /// Its letter.
    pub name: String,
    /// `read_ahead_kb` 0.
    pub exact: Vec<RecordedRead>,
    /// `read_ahead_kb` 128.
    pub read_ahead: Vec<RecordedRead>,
}

/// One recorded start and its image.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// Bytes of the image before compression.
    pub image_bytes: u64,
    /// Time to ready with everything in memory.
    pub warm: Duration,
    /// Chunks of the image that any run reads.
    pub chunks: Vec<ChunkSize>,
    /// Frames of the hot blob packed from the first run.
    pub frames: Vec<FrameSize>,
    /// The runs, in the order of their letters; at least one.
    pub runs: Vec<Run>,
}

/// All workloads of a directory, by name.
///
/// # Errors
/// If there are none, or a file is missing or not as described above.
pub fn read_directory(directory: &Path) -> Result<Vec<Workload>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.strip_suffix(".json")).map(str::to_owned));
    }
    names.sort();
    ensure!(!names.is_empty(), "{}: no NAME.json in it", directory.display());
    names.iter().map(|name| read_workload(directory, name)).collect()
}

fn read_workload(directory: &Path, name: &str) -> Result<Workload> {
    let path = directory.join(format!("{name}.json"));
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let json: serde_json::Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    let number = |key: &str| json.get(key).with_context(|| format!("{}: no {key}", path.display()));
    let image_bytes = number("image_bytes")?.as_u64().context("image_bytes is no number of bytes")?;
    let warm_seconds = number("warm_seconds")?.as_f64().context("warm_seconds is no number")?;
    let warm =
        Duration::try_from_secs_f64(warm_seconds).with_context(|| format!("{}: warm_seconds", path.display()))?;
    let table = |what: &str| Table::read(&directory.join(format!("{name}.{what}.csv.zst")));
    let chunks = table("chunks-256k")?.rows(["chunk", "raw_bytes", "zstd3_bytes"])?;
    let frames = table("packed-frames")?.rows(["frame", "pages", "zstd3_bytes"])?;
    let mut runs = Vec::new();
    for letter in 'a'..='z' {
        if !directory.join(format!("{name}.ra128.run-{letter}.csv.zst")).exists() {
            break;
        }
        let reads = |what: &str| table(&format!("{what}.run-{letter}"))?.rows(["t_us", "block", "blocks"]);
        let (exact, read_ahead) = (reads("ra0")?, reads("ra128")?);
        runs.push(Run { name: letter.to_string(), exact: recorded(&exact)?, read_ahead: recorded(&read_ahead)? });
    }
    ensure!(!runs.is_empty(), "{}: no {name}.ra128.run-a.csv.zst", directory.display());
    let chunk = |row: &[i64; 3]| {
        let [chunk, raw_len_bytes, stored_len_bytes] = unsigned(row)?;
        Ok(ChunkSize { chunk, raw_len_bytes, stored_len_bytes })
    };
    let frame = |row: &[i64; 3]| {
        let [_, blocks, stored_len_bytes] = unsigned(row)?;
        Ok(FrameSize { blocks, stored_len_bytes })
    };
    Ok(Workload {
        name: name.to_owned(),
        image_bytes,
        warm,
        chunks: chunks.iter().map(chunk).collect::<Result<_>>()?,
        frames: frames.iter().map(frame).collect::<Result<_>>()?,
        runs,
    })
}

fn recorded(rows: &[[i64; 3]]) -> Result<Vec<RecordedRead>> {
    let read = |row: &[i64; 3]| {
        let [_, block, blocks] = unsigned(&[0, row[1], row[2]])?;
        Ok(RecordedRead { at_us: row[0], block, blocks })
    };
    rows.iter().map(read).collect()
}

fn unsigned(row: &[i64; 3]) -> Result<[u32; 3]> {
    let [first, second, third] = row.map(u32::try_from);
    Ok([first?, second?, third?])
}

/// A CSV file with a head line and whole numbers.
struct Table {
    path: String,
    text: String,
}

impl Table {
    fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let stored = std::fs::read(path).with_context(|| name.clone())?;
        let text = zstd::bulk::decompress(&stored, FILE_BYTES_MAX).with_context(|| name.clone())?;
        Ok(Self { path: name, text: String::from_utf8(text)? })
    }

    /// The named columns of every row.
    fn rows<const COLUMNS: usize>(&self, columns: [&str; COLUMNS]) -> Result<Vec<[i64; COLUMNS]>> {
        let mut lines = self.text.lines();
        let head: Vec<&str> = lines.next().unwrap_or_default().split(',').map(str::trim).collect();
        let places: BTreeMap<&str, usize> = head.iter().enumerate().map(|(place, name)| (*name, place)).collect();
        let mut wanted = [0; COLUMNS];
        for (slot, column) in wanted.iter_mut().zip(columns) {
            let Some(place) = places.get(column) else { bail!("{}: no column {column}", self.path) };
            *slot = *place;
        }
        let row = |(index, line): (usize, &str)| {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let mut row = [0; COLUMNS];
            for (slot, place) in row.iter_mut().zip(wanted) {
                let field = fields.get(place).copied().unwrap_or_default();
                *slot =
                    i64::from_str(field).with_context(|| format!("{}: line {}: {field:?}", self.path, index + 2))?;
            }
            Ok(row)
        };
        lines.enumerate().filter(|(_, line)| !line.is_empty()).map(row).collect()
    }
}
