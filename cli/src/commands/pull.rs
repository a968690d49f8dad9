//! `ublkimg pull`: an image into the store of this host, without a device. The daemon is asked if it runs; otherwise the
//! store is opened here, so that it works where no kernel will serve a device: in the build of a machine image.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkimg_driver::daemon::protocol::{Answer, PullRequest, Request, StartOptions};
use ublkimg_driver::daemon::{client, pull_here};
use ublkimg_driver::pull::{Pull as What, Pulled};
use ublkimg_driver::{Engine, Store, learn_kept_chunks};
use ublkimg_registry::usual_credential_files;

use super::add;
use crate::args::Global;
use crate::args::pull::{Pull, What as WhatArgument};
use crate::output;

/// An image of a hundred gigabytes over a slow link takes hours.
const TIMEOUT: Duration = Duration::from_secs(24 * 3600);

pub(super) fn run(global: &Global, command: &Pull) -> anyhow::Result<()> {
    let began = Instant::now();
    let request = PullRequest {
        reference: super::location(&command.reference)?.to_string(),
        plain_http: command.registry.plain_http,
        auth_file: command.registry.auth_file.as_deref().map(super::absolute).transpose()?,
        credential_files: usual_credential_files(),
        hosts_dirs: command.registry.hosts_dirs.clone(),
        read_timeout_ms: add::milliseconds(command.io_timeout),
        start: StartOptions {
            profile: add::profile(&command.profile)?,
            command: command.command.clone(),
            ..StartOptions::default()
        },
        what: match command.what {
            WhatArgument::Profile => What::Profile,
            WhatArgument::All => What::All,
        },
    };
    let pulled = pull(global, &request)?;
    if command.json {
        return output::json(&pulled);
    }
    let (present, total) = (output::bytes(pulled.present_bytes), output::bytes(pulled.total_bytes));
    eprintln!("{present} of {total} on this host after {:.1} s", began.elapsed().as_secs_f64());
    output::line(&pulled.manifest)
}

fn pull(global: &Global, request: &PullRequest) -> anyhow::Result<Pulled> {
    let directories = super::directories(global)?;
    match client::ask(&directories, &Request::Pull(request.clone()), TIMEOUT)? {
        Some(Answer::Pulled(pulled)) => return Ok(pulled),
        Some(answer) => return Err(super::unexpected(&answer)),
        None => {}
    }
    let store = Arc::new(Store::open(&directories.root)?);
    let engine = Engine::start(&store)?;
    learn_kept_chunks(&store)?;
    engine.seed_links(store.links()?);
    let pulled = engine.runtime().block_on(pull_here(&store, &engine, request));
    let kept = store.put_links(&engine.links());
    engine.stop();
    if let Err(error) = kept {
        tracing::warn!("{}", error.chain());
    }
    Ok(pulled?)
}
