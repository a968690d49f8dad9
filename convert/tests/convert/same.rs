//! Same input, same bytes.

use std::num::NonZeroUsize;

use ublkimg_convert::{Options, Platforms};

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
    assert!(again.images[0].layers.iter().all(|layer| layer.existed));

    // Other settings are other bytes, but the same tree.
    let destination = format!("oci:{}/level:v1", dir.path().display());
    let other = run_with(&source, &destination, &Options { level: 9, ..Options::default() }).await.unwrap();
    assert_ne!(other.digest, summaries[0].digest);
    assert_eq!(other.images[0].metadata_raw_bytes, summaries[0].images[0].metadata_raw_bytes);
}

/// The digests below are part of the format: whoever converted before and converts again must get the same blobs. Change
/// them only with what FORMAT.md says a converter writes, and note it in its section 8.
#[tokio::test(flavor = "multi_thread")]
async fn digests_are_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let source = format!("oci:{}/source:v1", dir.path().display());
    let mut base = Vec::new();
    for number in 0..60_u64 {
        let data = fixture::noise(number, usize::try_from(number * 3001 % 40_000).unwrap());
        base.extend(fixture_file(&format!("usr/share/file{number}"), &data));
    }
    let large = fixture::noise(99, 700_000);
    base.extend(fixture_file("usr/lib/large", &large));
    base.extend(fixture_file("usr/lib/sparse", &[&[0; 300_000][..], &large].concat()));
    let mut upper = fixture_file("usr/share/.wh.file3", b"");
    upper.extend(fixture_file("usr/lib/copy", &large));
    upper.extend(fixture_file("usr/share/file4", b"changed"));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        fixture::sha256(&base),
        fixture::sha256(&upper)
    );
    fixture::push_layers(&source, &[(fixture::TAR, base), (fixture::TAR, upper)], config.as_bytes()).await;
    let platforms = Platforms::One("linux/amd64".parse().unwrap());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let converted = run_with(&source, &destination, &Options { platforms, ..Options::default() }).await.unwrap();
    let image = &converted.images[0];
    let digests = image.layers.iter().map(|layer| layer.digest).chain([image.manifest]);
    let expected = [
        "sha256:f0bbce849537476d9d83cbd8b2dde86f67849d297073cdaf50c9d4dcc1f32593",
        "sha256:ee21459481a954643059ffa37775e15d3a07d01830d979b82aa7de47693e8e68",
        "sha256:175415d0726571ea09c24076728f97302fe13d0dccb0be21e863bfb3e9410f09",
    ];
    assert_eq!(digests.map(|digest| digest.to_string()).collect::<Vec<_>>(), expected);
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
