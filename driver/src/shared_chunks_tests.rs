//! What blobs have in common is fetched once, and nobody's lie makes it other than it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_scheduler::FillMode;
use ublkimg_tests::fault_row::FaultRow;

use crate::fixture::{Frame, Image, LayerContent, read};
use crate::tests::{Rig, device_blocks};
use crate::{ImageStatistics, LoadedImage, learn_kept_chunks};

/// Different chunks that images are made of.
const POOL: usize = 8;

fn pool() -> LayerContent {
    LayerContent::new(9, &[1, 7, 64, 3, 64, 20, 2, 33])
}

/// An image whose layers have these chunks of the pool.
fn image_of(layers: &[Vec<usize>]) -> Image {
    let pool = pool();
    let chunks = pool.chunks();
    let layer = |numbers: &Vec<usize>| {
        LayerContent::of_chunks(&numbers.iter().map(|number| chunks[*number]).collect::<Vec<_>>())
    };
    Image::new(&layers.iter().map(layer).collect::<Vec<_>>())
}

fn assert_whole(loaded: &LoadedImage, image: &Image) {
    assert!(read(&loaded.image, 0, device_blocks(image)).unwrap() == image.device, "wrong bytes");
}

fn wait_until_filled(loaded: &LoadedImage) {
    let until = Instant::now() + Duration::from_secs(60);
    while loaded.image.stored_bytes().0 < loaded.image.stored_bytes().1 {
        assert!(Instant::now() < until, "the fill does not end: {:?}", loaded.image.statistics());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Chunks that were fetched and copied.
fn came(statistics: ImageStatistics) -> (u64, u64) {
    assert_eq!(statistics.verification_failures, 0);
    (statistics.fetched_chunks, statistics.copied_chunks)
}

/// The data file of the only blob file in the store.
fn only_data_file(rig: &Rig) -> PathBuf {
    let files = std::fs::read_dir(rig.root.path().join("blobs")).unwrap().map(|entry| entry.unwrap().path());
    let mut data = files.filter(|path| path.extension().is_some_and(|extension| extension == "data"));
    let only = data.next().unwrap();
    assert!(data.next().is_none());
    only
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// One after another or at once, read or filled, after a restart or not: each name comes over the network once.
    #[test]
    fn a_chunk_is_fetched_once_whatever_blobs_have_it(
        images in prop::collection::vec(
            (prop::collection::vec(prop::collection::vec(0..POOL, 1..7), 1..4), any::<bool>(), any::<bool>()),
            1..5,
        ),
    ) {
        let mut rig = Rig::new();
        let (mut all, mut wanted) = (Vec::new(), BTreeMap::new());
        let mut names = BTreeSet::<usize>::new();
        let mut came_in = (0, 0);
        for (number, (layers, is_filled, restarts)) in images.iter().enumerate() {
            if *restarts {
                for (loaded, _) in all.drain(..) {
                    wait_until_filled(&loaded);
                    let (fetched, copied) = came(loaded.image.statistics());
                    came_in = (came_in.0 + fetched, came_in.1 + copied);
                }
                rig = rig.restart();
                learn_kept_chunks(&rig.store).unwrap();
            }
            for layer in layers {
                names.extend(layer);
                wanted.insert(layer.clone(), layer.len());
            }
            let image = image_of(layers);
            let loaded = rig.attach(&rig.push(&image, &format!("v{number}"))).unwrap();
            if *is_filled {
                loaded.image.set_fill(FillMode::Full);
            } else {
                assert_whole(&loaded, &image);
            }
            all.push((loaded, image));
        }
        prop_assert_eq!(rig.engine.counters().duplicates, 0);
        for (loaded, image) in all {
            wait_until_filled(&loaded);
            assert_whole(&loaded, &image);
            let (fetched, copied) = came(loaded.image.statistics());
            came_in = (came_in.0 + fetched, came_in.1 + copied);
        }
        let wanted: usize = wanted.values().sum();
        prop_assert_eq!(came_in, (names.len() as u64, (wanted - names.len()) as u64));
    }
}

#[test]
fn a_chunk_outlives_the_image_that_brought_it() {
    let rig = Rig::new();
    let (first, second) = (image_of(&[vec![0, 2, 4]]), image_of(&[vec![5, 4, 2], vec![2, 1]]));
    let loaded = rig.attach(&rig.push(&first, "v1")).unwrap();
    assert_whole(&loaded, &first);
    drop(loaded);
    let loaded = rig.attach(&rig.push(&second, "v2")).unwrap();
    assert_whole(&loaded, &second);
    assert_eq!(came(loaded.image.statistics()), (2, 3));
}

#[test]
fn what_the_disk_has_changed_is_not_copied() {
    let rig = Rig::new();
    let (first, second) = (image_of(&[vec![2, 4]]), image_of(&[vec![4, 2]]));
    assert_whole(&rig.attach(&rig.push(&first, "v1")).unwrap(), &first);
    let data = OpenOptions::new().write(true).open(only_data_file(&rig)).unwrap();
    data.write_all_at(b"damaged", 70 * BLOCK_SIZE as u64).unwrap();
    let loaded = rig.attach(&rig.push(&second, "v2")).unwrap();
    assert_whole(&loaded, &second);
    assert_eq!(came(loaded.image.statistics()), (1, 1));
}

#[test]
fn what_was_evicted_is_fetched() {
    let rig = Rig::new();
    let (first, second) = (image_of(&[vec![2, 4]]), image_of(&[vec![4, 2]]));
    assert_whole(&rig.attach(&rig.push(&first, "v1")).unwrap(), &first);
    rig.store.make_room(u64::MAX, &BTreeSet::new(), &BTreeSet::new()).unwrap();
    let loaded = rig.attach(&rig.push(&second, "v2")).unwrap();
    assert_whole(&loaded, &second);
    assert_eq!(came(loaded.image.statistics()), (2, 0));
}

/// An index that names the honest image's chunks, over frames that are others.
fn with_others_names(frames: &LayerContent, names: &LayerContent) -> Vec<Frame> {
    let named = names.chunks().into_iter().map(Frame::new);
    let frame = |(raw, named): (&[u8], Frame)| Frame { name: named.name, ..Frame::new(raw) };
    frames.chunks().into_iter().zip(named).map(frame).collect()
}

#[test]
fn a_forged_index_gives_no_other_image_wrong_bytes() {
    let content = || LayerContent::new(1, &[64, 3, 17]);
    let lies = || LayerContent::new(2, &[64, 3, 17]);
    // One more chunk makes it another blob.
    let with_more = |mut frames: Vec<Frame>, content: &LayerContent| {
        let more = LayerContent::new(3, &[1]);
        frames.push(Frame::new(&more.raw));
        let mut chunks = content.chunks();
        chunks.push(&more.raw);
        Image::of_frames(LayerContent::of_chunks(&chunks), &frames)
    };
    let honest = Image::new(&[content()]);
    let forged = with_more(with_others_names(&lies(), &content()), &lies());
    for forged_first in [true, false] {
        let rig = Rig::new();
        let attach = |image: &Image, tag: &str| rig.attach(&rig.push(image, tag)).unwrap();
        let read_honest = |tag: &str| {
            let loaded = attach(&honest, tag);
            assert_whole(&loaded, &honest);
            loaded
        };
        let before = (!forged_first).then(|| read_honest("honest"));
        let loaded = attach(&forged, "forged");
        let start = forged.layer_starts[0];
        if forged_first {
            assert_eq!(read(&loaded.image, start, 1), Err(libc::EIO), "its frame is not what its index names");
            assert_eq!(loaded.image.statistics().copied_chunks, 0);
        } else {
            // It said that it has the other image's chunk, and so it has.
            assert!(read(&loaded.image, start, 64).unwrap() == content().raw[..64 * BLOCK_SIZE]);
        }
        let fault = FaultRow::begins("a forged chunk index with the names of another image's chunks");
        let after = read_honest("again");
        fault.ends("the other image reads right bytes");
        assert_eq!(after.image.statistics().verification_failures, 0);
        drop(before);
    }
}

#[test]
fn a_chunk_of_another_length_than_its_name_has_is_refused() {
    let content = LayerContent::new(1, &[64, 3]);
    let mut frames: Vec<Frame> = content.chunks().into_iter().map(Frame::new).collect();
    frames.reverse();
    for frame in &mut frames {
        frame.raw_len_bytes = 5 * BLOCK_SIZE as u64;
    }
    let liar = Image::of_frames(LayerContent::new(1, &[5, 5]), &frames);
    let honest = Image::new(&[content]);
    for liar_first in [true, false] {
        let rig = Rig::new();
        let attach = |image: &Image, tag: &str| rig.attach(&rig.push(image, tag)).unwrap();
        if !liar_first {
            assert_whole(&attach(&honest, "honest"), &honest);
        }
        let loaded = attach(&liar, "liar");
        assert_eq!(read(&loaded.image, liar.layer_starts[0], 1), Err(libc::EIO));
        assert_eq!(loaded.image.statistics().copied_chunks, 0);
        assert_whole(&attach(&honest, "again"), &honest);
    }
}
