//! An image's config, as far as it says how to run the image (OCI image specification, config.md).

use serde::Deserialize;
use ublkimg_driver::error::{Error, ErrorKind};

/// The config of an image.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ImageConfig {
    #[serde(default)]
    config: Option<Process>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    volumes: Option<serde_json::Map<String, serde_json::Value>>,
}

impl ImageConfig {
    /// The command to run: what the user gave, else the image's own.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when there is neither.
    pub(crate) fn command(&self, given: &[String]) -> anyhow::Result<Vec<String>> {
        if !given.is_empty() {
            return Ok(given.to_vec());
        }
        let process = self.config.as_ref();
        let parts = process.map(|process| [process.entrypoint.clone(), process.cmd.clone()]);
        let own: Vec<String> = parts.into_iter().flatten().flatten().flatten().collect();
        if own.is_empty() {
            let text = "the image has no command of its own: give one after `--`";
            return Err(Error::new(ErrorKind::Invalid, text).into());
        }
        Ok(own)
    }

    /// `USER[:GROUP]`; empty is root.
    pub(crate) fn user(&self) -> &str {
        self.config.as_ref().and_then(|process| process.user.as_deref()).unwrap_or_default()
    }

    /// `NAME=VALUE` each.
    pub(crate) fn env(&self) -> &[String] {
        self.config.as_ref().and_then(|process| process.env.as_deref()).unwrap_or_default()
    }

    /// Where the command starts.
    pub(crate) fn working_dir(&self) -> &str {
        let directory = self.config.as_ref().and_then(|process| process.working_dir.as_deref());
        directory.filter(|directory| !directory.is_empty()).unwrap_or("/")
    }

    /// Directories that the image expects to be there for data.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = &str> {
        let volumes = self.config.as_ref().and_then(|process| process.volumes.as_ref());
        volumes.into_iter().flat_map(|volumes| volumes.keys().map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_the_given_one_or_the_image_s() {
        let parse = |text: &str| serde_json::from_str::<ImageConfig>(text).unwrap();
        let image =
            parse(r#"{"config": {"Entrypoint": ["run"], "Cmd": ["a", "b"], "Env": null, "Volumes": {"/v": {}}}}"#);
        assert_eq!(image.command(&[]).unwrap(), ["run", "a", "b"]);
        assert_eq!(image.command(&["sh".to_owned()]).unwrap(), ["sh"]);
        assert_eq!((image.user(), image.working_dir()), ("", "/"));
        assert_eq!(image.volumes().collect::<Vec<_>>(), ["/v"]);
        for none in ["{}", r#"{"config": null}"#, r#"{"config": {"Cmd": []}}"#] {
            assert!(parse(none).command(&[]).is_err(), "{none}");
        }
    }
}
