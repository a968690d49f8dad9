//! What the end-to-end tests stand on. The tests themselves are in `tests/tests`.

#![forbid(unsafe_code)]

pub mod command;
pub mod compare;
pub mod docker_registry;
pub mod expected_tree;
pub mod fault_row;
mod foreign_server;
pub mod host;
pub mod http;
pub mod leaks;
pub mod nginx;
pub mod oci_layout;
pub mod registry;
pub mod sample_image;
pub mod skip;
pub mod start;
pub mod tar;
pub mod temp_root;
pub mod tls;
