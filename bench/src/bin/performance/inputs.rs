//! The images that are made for the measurements, converted, as tags of one layout; nothing is made twice.
//!
//! `sample`: the small image of the tests. `layers`: 50 layers of a few files. `large`: 5 GB in 10 layers. `gigabyte`: one
//! file of 1 GB that does not compress, so that a byte read is a byte on the wire.

use std::path::Path;

use anyhow::{Context as _, Result};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::sample_image::{SampleImage, noise};
use ublkimg_tests::tar::{Entry, LongNames, archive};

use crate::machine::run;

const MIB: usize = 1 << 20;

/// Makes what is missing in `dir`; the layout is `dir/erofs`.
pub(crate) fn prepare(dir: &Path, ublkimg: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    for (tag, write) in
        [("sample", sample as fn(&Path) -> Result<()>), ("layers", layers), ("large", large), ("gigabyte", gigabyte)]
    {
        let done = dir.join(format!("{tag}.done"));
        if done.exists() {
            continue;
        }
        println!("performance: making the image {tag}");
        let source = dir.join(tag);
        if source.exists() {
            std::fs::remove_dir_all(&source)?;
        }
        write(&source).with_context(|| format!("cannot make the image {tag}"))?;
        let (from, to) =
            (format!("oci:{}:{tag}", source.display()), format!("oci:{}:{tag}", dir.join("erofs").display()));
        run(&ublkimg.to_string_lossy(), &["convert", "--no-cache", &from, &to])?;
        std::fs::remove_dir_all(&source)?;
        std::fs::write(done, "")?;
    }
    Ok(())
}

fn sample(dir: &Path) -> Result<()> {
    SampleImage::default().write_layout(dir, "sample")?;
    Ok(())
}

fn layers(dir: &Path) -> Result<()> {
    let layer = |number: u64| {
        let file = |file: u64| Entry::file(&format!("layer{number}/file{file}"), noise(number << 8 | file, 40_000));
        let entries: Vec<Entry> = (0..40).map(file).collect();
        Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::None }
    };
    OciLayout::create(dir)?.add_image("layers", (1..=50).map(layer))?;
    Ok(())
}

fn large(dir: &Path) -> Result<()> {
    let layer = |number: u64| {
        let entries = [Entry::file(&format!("large{number}"), counted(number, 512 * MIB))];
        Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::Zstd }
    };
    OciLayout::create(dir)?.add_image("large", (0..10).map(layer))?;
    Ok(())
}

/// Blocks that are all different and compress to almost nothing.
fn counted(seed: u64, len_bytes: usize) -> Vec<u8> {
    let block = |number: u64| (seed << 32 | number).to_le_bytes().repeat(512);
    (0..).flat_map(block).take(len_bytes).collect()
}

fn gigabyte(dir: &Path) -> Result<()> {
    let entries = [Entry::file("data", noise(1, 1024 * MIB))];
    let layer = Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::None };
    OciLayout::create(dir)?.add_image("gigabyte", [layer])?;
    Ok(())
}
