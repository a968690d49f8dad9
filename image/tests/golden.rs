//! Pins the bytes of a fixed tree. A change here is a change of the format: images converted before and after it differ
//! and share nothing. Make it on purpose, and note it in the version history of FORMAT.md.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use support::fixture::Fixture;
use ublkimg_image::{BLOCK_SIZE, DeviceSlot, Sha256, Space, write_layer, write_merged};

fn blocks(data: &[u8]) -> u32 {
    u32::try_from(data.len() / BLOCK_SIZE).unwrap()
}

#[test]
fn layer_metadata_is_as_ever() {
    let fixture = Fixture::new(&[Space::Own], 0);
    let metadata = write_layer(&fixture.tree, blocks(&fixture.data[0])).unwrap();
    assert_eq!(Sha256::of(&metadata).hex(), "594fa2dde5c3124cef71376e9d8254065b6230ffe04cd1ce9427d996c4c20a20");
}

#[test]
fn merged_metadata_is_as_ever() {
    let fixture = Fixture::new(&[Space::Device(0), Space::Device(1)], 5);
    let slot = |data: &Vec<u8>| DeviceSlot { blocks: blocks(data), tag: Sha256::of(data) };
    let slots: Vec<_> = fixture.data.iter().map(slot).collect();
    let metadata = write_merged(&fixture.tree, &slots).unwrap();
    assert_eq!(Sha256::of(&metadata).hex(), "3759975ae1edf0ac4c87a45bbe90e078cd5de2e6c1170223cd79fcd4f8966004");
}
