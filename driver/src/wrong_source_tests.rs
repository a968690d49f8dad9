//! Who sends wrong bytes costs nobody a read who has another source.

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use ublkimg_registry::{ClientOptions, Location};
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::registry::{Config, Fault, TestRegistry, Toxic};

use crate::fixture::{Image, LayerContent, blob_path, read};
use crate::tests::{Rig, device_blocks};
use crate::{AttachOptions, LoadedImage, attach};

fn image() -> Image {
    Image::new(&[LayerContent::new(1, &[64, 3, 64, 64])])
}

/// Every byte of the layer becomes another.
fn spoil(directory: &Path, image: &Image) {
    let path = blob_path(directory, image.manifest.layers[0].digest);
    let spoilt: Vec<u8> = std::fs::read(&path).unwrap().iter().map(|byte| !byte).collect();
    std::fs::write(&path, spoilt).unwrap();
}

/// The image from a directory of its own, whose layer is spoilt.
fn from_a_liar(rig: &Rig, image: &Image) -> (TempDir, LoadedImage) {
    let directory = tempfile::tempdir().unwrap();
    let location = rig.engine.runtime().block_on(image.push(directory.path(), "v1"));
    spoil(directory.path(), image);
    let loaded = rig.attach(&location).unwrap();
    (directory, loaded)
}

#[test]
fn an_image_whose_registry_lies_costs_one_with_the_same_layers_no_read() {
    for liar_first in [true, false] {
        let (rig, image) = (Rig::new(), image());
        let attach_honest = || rig.attach(&rig.push(&image, "v1")).unwrap();
        let honest = (!liar_first).then(attach_honest);
        let (_directory, liar) = from_a_liar(&rig, &image);
        let honest = honest.unwrap_or_else(attach_honest);
        let fault = FaultRow::begins("wrong bytes from the registry of another image with the same layers");
        assert!(read(&honest.image, image.layer_starts[0], 1).is_ok());
        fault.ends("asked for elsewhere: data");
        assert!(read(&honest.image, 0, device_blocks(&image)).unwrap() == image.device);
        let failures = liar.image.statistics().verification_failures;
        assert_eq!(failures, u64::from(liar_first), "who has lied is asked last");
        assert_eq!(honest.image.statistics().verification_failures, 0);
        assert!(read(&liar.image, 0, device_blocks(&image)).unwrap() == image.device);
    }
}

#[test]
fn when_everybody_lies_it_is_an_error() {
    let (rig, image) = (Rig::new(), image());
    let (_directories, liars): (Vec<_>, Vec<_>) = (0..3).map(|_| from_a_liar(&rig, &image)).unzip();
    assert_eq!(read(&liars[2].image, image.layer_starts[0], 1), Err(libc::EIO));
    for liar in liars {
        assert_eq!(liar.image.statistics().verification_failures, 1, "each was asked once");
    }
}

/// A registry that has the image.
fn registry_of(directory: &TempDir) -> TestRegistry {
    let registry = TestRegistry::start(Config::default()).unwrap();
    registry.load_layout(directory.path(), Some("v1"), "app", "v1").unwrap();
    registry
}

fn attach_to(rig: &Rig, registry: &TestRegistry, client: ClientOptions) -> LoadedImage {
    let location: Location = registry.reference("app", "v1").parse().unwrap();
    let options = AttachOptions { client, read_deadline: Duration::from_secs(8), ..AttachOptions::default() };
    rig.engine.runtime().block_on(attach(&rig.store, &rig.engine, &location, &options)).unwrap()
}

#[test]
fn a_mirror_that_lies_costs_no_read() {
    let (rig, image, directory) = (Rig::new(), image(), tempfile::tempdir().unwrap());
    rig.engine.runtime().block_on(image.push(directory.path(), "v1"));
    let (registry, mirror) = (registry_of(&directory), registry_of(&directory));
    let hosts = directory.path().join("hosts").join(registry.addr().to_string());
    std::fs::create_dir_all(&hosts).unwrap();
    std::fs::write(hosts.join("hosts.toml"), format!("[host.\"http://{}\"]\n", mirror.addr())).unwrap();
    let hosts_dirs = vec![directory.path().join("hosts")];
    mirror.set_fault("lie", Fault::new("*/blobs/*", Toxic::BitFlip { offset_bytes: 100 }));
    let loaded = attach_to(&rig, &registry, ClientOptions { hosts_dirs, ..ClientOptions::default() });
    assert_eq!(mirror.fault_hits("lie"), 1, "of its metadata");
    let layer = format!("*/blobs/{}", image.manifest.layers[0].digest);
    mirror.set_fault("lie", Fault::new(&layer, Toxic::BitFlip { offset_bytes: 5000 }));
    let fault = FaultRow::begins("wrong bytes from a mirror");
    assert!(read(&loaded.image, image.layer_starts[0], 1).is_ok());
    fault.ends("asked for at the registry: data");
    assert!(read(&loaded.image, 0, device_blocks(&image)).unwrap() == image.device);
    assert_eq!((mirror.fault_hits("lie"), loaded.image.statistics().verification_failures), (1, 1));
}
