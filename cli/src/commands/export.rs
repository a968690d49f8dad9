//! `ublkimg export`: the image as a file that every kernel with EROFS mounts.

use std::path::PathBuf;

use ublkimg_convert::export_file;
use ublkimg_driver::daemon::device_name;
use ublkimg_registry::Repository;

use crate::args::Export;
use crate::output;

pub(super) fn run(command: &Export) -> anyhow::Result<()> {
    let location = super::location(&command.reference)?;
    let platform = super::platform(command.platform.as_deref())?;
    let path: PathBuf = match command.path.is_dir() {
        true => command.path.join(format!("{}.erofs", device_name(&location.to_string()))),
        false => command.path.clone(),
    };
    let client = super::client_options(&command.registry);
    super::runtime()?.block_on(async {
        let repository = Repository::open(&location, &client).await?;
        export_file(&repository, &platform, &path).await
    })?;
    output::line(&path.display().to_string())
}
