//! Same input, same bytes.

use std::num::NonZeroUsize;

use ublkimg_convert::Options;

use crate::{fixture, run_with};

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_has_the_same_digest_however_many_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = format!("oci:{}/source:v1", dir.path().display());
    let mut tar = Vec::new();
    for number in 0..200_u64 {
        let data = fixture::noise(number, usize::try_from(number * 977 % 50_000).unwrap());
        tar.extend(fixture_file(&format!("dir{}/file{number}", number % 5), &data));
    }
    tar.extend(fixture_file("large", &fixture::noise(7, 2_000_000)));
    tar.extend([0; 1024]);
    let config = fixture::config(&[fixture::sha256(&tar)]);
    fixture::push_layers(&source, &[(fixture::TAR_GZIP, fixture::gzip(&tar))], &config).await;

    let mut summaries = Vec::new();
    for threads in [1, 2, 5] {
        let destination = format!("oci:{}/{threads}:v1", dir.path().display());
        let options = Options { threads: NonZeroUsize::new(threads).unwrap(), ..Options::default() };
        summaries.push(run_with(&source, &destination, &options).await.unwrap());
    }
    assert_eq!(summaries[0], summaries[1]);
    assert_eq!(summaries[0], summaries[2]);

    // A second time, nothing needs to be stored.
    let destination = format!("oci:{}/1:again", dir.path().display());
    let again = run_with(&source, &destination, &Options::default()).await.unwrap();
    assert_eq!(again.digest, summaries[0].digest);
    assert!(again.layers.iter().all(|layer| layer.existed));

    // Other settings are other bytes, but the same tree.
    let destination = format!("oci:{}/level:v1", dir.path().display());
    let other = run_with(&source, &destination, &Options { level: 9, ..Options::default() }).await.unwrap();
    assert_ne!(other.digest, summaries[0].digest);
    assert_eq!(other.metadata_raw_bytes, summaries[0].metadata_raw_bytes);
}

/// One file as a tar entry.
pub(crate) fn fixture_file(path: &str, data: &[u8]) -> Vec<u8> {
    let mut header = tar_core::Header::new_ustar();
    header.set_path(path.as_bytes()).unwrap();
    header.set_mode(0o644).unwrap();
    header.set_size(data.len() as u64).unwrap();
    header.set_entry_type(tar_core::EntryType::Regular);
    header.set_checksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}
