//! `ublkimg ready`: the program is ready. The time to ready is then known, and the read-ahead window is the default again.

use ublkimg_driver::daemon::client;
use ublkimg_driver::daemon::protocol::Request;

use super::status;
use crate::args::{Global, Ready};

pub(super) fn run(global: &Global, command: &Ready) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = status::find(&directories, &command.target)?;
    client::ask(&directories, &Request::Ready { name: device.name }, client::ANSWER_MARGIN)?;
    Ok(())
}
