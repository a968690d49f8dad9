//! Starts of containers, as the demo and the benchmarks make them: from whole layers and from attached images.

pub mod classic;
pub mod cleanup;
pub mod container;
pub mod program;
pub mod push;
