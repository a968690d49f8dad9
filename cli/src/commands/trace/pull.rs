//! `ublkimg trace pull`: a trace of an image, from the profiles that its index lists, then from its referrers.

use serde::Serialize;
use ublkimg_convert::load_trace;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::trace::command_digest;
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::choose;
use ublkimg_registry::profile::{ListedProfile, ProfileChoice, Trust, choose_profile, profiles};
use ublkimg_registry::{Digest, Repository};

use crate::args::trace::Pull;
use crate::{commands, output};

/// What `trace pull --json` prints.
#[derive(Serialize)]
struct Pulled {
    file: String,
    image: String,
    profile: String,
    name: Option<String>,
    command: Vec<String>,
    /// `index` or `referrer`.
    found_in: &'static str,
    blocks: u64,
}

pub(super) fn run(command: &Pull) -> anyhow::Result<()> {
    let location = commands::location(&command.reference)?;
    let options = commands::client_options(&command.registry);
    let wanted = Some(&command.command).filter(|argv| !argv.is_empty()).map(|argv| Digest(command_digest(argv).0));
    let choice = match &command.name {
        Some(name) => name.parse()?,
        None => ProfileChoice::Auto,
    };
    let (image, listed, bytes) = commands::runtime()?.block_on(async {
        let repository = Repository::open(&location, &options).await?;
        let (image, all) = list(&repository).await?;
        let listed = pick(&all, &choice, wanted.as_ref())?.clone();
        let manifest = repository.fetch_profile(&listed, &image).await?;
        anyhow::Ok((image, listed, repository.fetch_trace(&manifest).await?))
    })?;
    // It goes to the file as it is, but only if it is one.
    let trace = load_trace(&bytes)?;
    super::file::write(&command.output, &bytes)?;
    let pulled = Pulled {
        file: command.output.display().to_string(),
        image: image.to_string(),
        profile: listed.descriptor.digest.to_string(),
        name: listed.name,
        found_in: if listed.trust == Trust::Bytes { "index" } else { "referrer" },
        blocks: trace.blocks(),
        command: trace.header.command,
    };
    if command.json {
        return output::json(&pulled);
    }
    let Pulled { file, command, found_in, blocks, .. } = pulled;
    output::line(&format!("{file}: {blocks} blocks of {} ({found_in})", super::command_text(&command)))
}

/// The image's manifest and its profiles, those of the index first.
async fn list(repository: &Repository) -> anyhow::Result<(Digest, Vec<ListedProfile>)> {
    let resolved = repository.resolve().await?;
    let is_index = [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str());
    let image = if is_index { choose(&resolved.bytes, &Platform::host())?.digest } else { resolved.digest };
    let mut all = if is_index { profiles(&resolved.bytes, &image)? } else { Vec::new() };
    for referrer in repository.profile_referrers(&image).await? {
        // What the index lists is among the referrers too.
        if all.iter().all(|listed| listed.descriptor.digest != referrer.descriptor.digest) {
            all.push(referrer);
        }
    }
    Ok((image, all))
}

/// The profile that was asked for; without a wish, the default or the only one.
fn pick<'a>(
    all: &'a [ListedProfile],
    choice: &ProfileChoice,
    command: Option<&Digest>,
) -> anyhow::Result<&'a ListedProfile> {
    let chosen = match command {
        // A default is for another command.
        Some(command) => all.iter().find(|profile| profile.command.as_ref() == Some(command)),
        None => choose_profile(all, choice, None)?.or_else(|| all.first().filter(|_| all.len() == 1)),
    };
    let what = match (all.len(), command) {
        (0, _) => "the image has no profile".to_owned(),
        (_, Some(_)) => "the image has no profile of this command".to_owned(),
        (count, None) => format!("the image has {count} profiles and no default: choose with --name or --command"),
    };
    chosen.ok_or_else(|| Error::new(ErrorKind::NotFound, what).into())
}
