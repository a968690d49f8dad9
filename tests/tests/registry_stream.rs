//! A long range of a blob, streamed through a registry that gets into trouble on the way.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use ublkimg_registry::{ClientOptions, Digest, Repository};
use ublkimg_tests::registry::{Config, Fault, LinkConfig, TestRegistry, Toxic};
use ublkimg_tests::sample_image::noise;

/// What a reset connection can have had under way: the link's 40 ms at 100 Mbit/s, the registry's and both kernels' buffers.
const UNDER_WAY_MAX_BYTES: u64 = 8 << 20;

#[tokio::test]
async fn slow_then_cut_then_busy_the_place_is_kept() {
    let link = LinkConfig::new(100, 20);
    let registry = TestRegistry::start(Config { link, ..Config::default() }).unwrap();
    let bytes = noise(1, 8_000_000);
    let digest = Digest(registry.put_blob("a", bytes.clone()).unwrap().0);
    let options = ClientOptions { auth_file: Some("/dev/null".into()), ..ClientOptions::default() };
    let location = registry.reference("a", "v1").parse().unwrap();
    let repository = Repository::open(&location, &options).await.unwrap();

    // Slow from the start, away after half a second for one, and busy when it is back.
    let start = Instant::now();
    registry.set_fault("slow", Fault::new("*/blobs/*", Toxic::Slow { bytes_per_s: 2_000_000 }).for_ms(500));
    registry.set_fault("away", Fault::new("*", Toxic::Refuse).after_ms(500).for_ms(1000));
    registry.set_fault("busy", Fault::new("*", Toxic::TooManyRequests { retry_after_s: 1 }).after_ms(1500).times(1));
    let mut stream = repository.blob_stream(&digest, 1000..8_000_000);
    let mut read = Vec::new();
    while let Some(piece) = stream.next().await {
        read.extend_from_slice(&piece.unwrap());
    }
    assert!(read == bytes[1000..]);
    assert!(start.elapsed() >= Duration::from_millis(2500), "it waited: {:?}", start.elapsed());
    assert_eq!((registry.fault_hits("slow"), registry.fault_hits("busy")), (1, 1));
    let stats = registry.stats();
    let blob = &stats.blobs[&digest.to_string()];
    assert_eq!(blob.ranges.len(), 2, "{:?}", blob.ranges);
    assert_eq!((blob.ranges[0].clone(), blob.ranges[1].end), (1000..8_000_000, 8_000_000));
    assert!(blob.ranges[1].start > 100_000, "what came is not asked for again: {:?}", blob.ranges);
    assert!(blob.duplicate_bytes < UNDER_WAY_MAX_BYTES, "{}", blob.duplicate_bytes);
}
