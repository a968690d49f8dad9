//! Random stacks of layers, unpacked by umoci and converted by us: every object must be the same.
//!
//! umoci gets each layer as a plain archive, we get it in the oddest form that means the same, so a difference is a fault
//! of our reader, of our merge, or of the file system that came out. `UBLKIMG_STACKS=N` tries N stacks instead of some
//! dozens, `UBLKIMG_STACKS_FROM=SEED` begins elsewhere; a failure names its seed.

mod archive;
mod generator;
mod layers;
mod random;
mod sparse;

use archive::{Dialect, archive};
use layers::Layer;
use random::Random;

use crate::{fixture, umoci};

/// Stacks tried unless told otherwise: half a minute.
const STACKS: u64 = 40;

#[tokio::test(flavor = "multi_thread")]
async fn random_stacks_make_the_same_tree_as_umoci_does() {
    if !umoci::is_there() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let count: u64 = number("UBLKIMG_STACKS").unwrap_or(STACKS);
    let from: u64 = number("UBLKIMG_STACKS_FROM").unwrap_or_default();
    for seed in from..from + count {
        println!("seed {seed}");
        check(seed).await;
    }
}

async fn check(seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let location = |name: &str| format!("oci:{}/{name}:v1", dir.path().display());
    let stack = generator::stack(seed);
    push_plain(&location("plain"), &stack).await;
    push_odd(&location("odd"), &stack, &mut Random::new(!seed)).await;

    let chunk_size = ["64K", "128K", "256K"][usize::try_from(seed % 3).unwrap()].parse().unwrap();
    let differences = umoci::differences(&dir.path().join("plain"), "v1", &location("odd"), chunk_size).await;
    assert!(differences.is_empty(), "seed {seed}: {}", differences.join("\n"));
}

async fn push_plain(location: &str, stack: &[Layer]) {
    let tars: Vec<Vec<u8>> = stack.iter().map(|layer| archive(layer, Dialect::Plain)).collect();
    push(location, tars.iter().map(|tar| (fixture::TAR, tar.clone())).collect(), &tars).await;
}

async fn push_odd(location: &str, stack: &[Layer], random: &mut Random) {
    let mut tars = Vec::new();
    let mut stored = Vec::new();
    for layer in stack {
        let tar = archive(layer, Dialect::Odd(random));
        // What the media type says is not what counts.
        let media_type = *random.choose(&[fixture::TAR, fixture::TAR_GZIP, fixture::TAR_ZSTD]);
        stored.push((media_type, compressed(&tar, random)));
        tars.push(tar);
    }
    push(location, stored, &tars).await;
}

async fn push(location: &str, stored: Vec<(&str, Vec<u8>)>, tars: &[Vec<u8>]) {
    let diff_ids: Vec<String> = tars.iter().map(|tar| fixture::sha256(tar)).collect();
    fixture::push_layers(location, &stored, &fixture::config(&diff_ids)).await;
}

/// Plain, or as gzip members or zstd frames with extras between them.
fn compressed(tar: &[u8], random: &mut Random) -> Vec<u8> {
    let (first, second) = tar.split_at(random.below(tar.len() + 1));
    let frame = |data: &[u8]| zstd::bulk::compress(data, 1).unwrap();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
    match random.below(4) {
        0 => tar.to_vec(),
        1 => fixture::gzip(tar),
        2 => [fixture::gzip(first), fixture::gzip(b""), fixture::gzip(second)].concat(),
        _ => [frame(first), skippable.clone(), frame(second), skippable].concat(),
    }
}
