//! The image config: the original one, but for what describes the layers.

use serde_json::{Map, Value, json};
use ublkimg_image::Sha256;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::erofs_manifest::OS_FEATURE_EROFS;

use crate::error::{Error, Result};

/// An image config, with all fields that we do not know.
#[derive(Clone, Debug)]
pub(crate) struct Config(Map<String, Value>);

impl Config {
    /// Reads a config.
    ///
    /// # Errors
    /// `BadSource` if it is not one, `Unsupported` if it is for another system than Linux.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let map = serde_json::from_slice(bytes).map_err(|error| Error::bad_source(format!("image config: {error}")))?;
        let config = Self(map);
        if config.text("os").is_some_and(|os| os != "linux") {
            return Err(Error::unsupported(format!("an image for {}", config.text("os").unwrap_or_default())));
        }
        Ok(config)
    }

    /// A config without settings, for what had none.
    pub(crate) fn empty(platform: &Platform) -> Self {
        let mut map = Map::new();
        map.insert("architecture".to_owned(), json!(platform.architecture));
        map.insert("os".to_owned(), json!(platform.os));
        if let Some(variant) = &platform.variant {
            map.insert("variant".to_owned(), json!(variant));
        }
        map.insert("config".to_owned(), json!({}));
        Self(map)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }

    /// What the image needs to run on; `default` fills what the config leaves out.
    pub(crate) fn platform(&self, default: &Platform) -> Platform {
        let mut platform = Platform::new(
            self.text("os").unwrap_or(&default.os),
            self.text("architecture").unwrap_or(&default.architecture),
        );
        platform.variant = self.text("variant").map(str::to_owned);
        platform
    }

    /// The digests of the uncompressed layers, if the config has them.
    ///
    /// # Errors
    /// `BadSource` when they are not one SHA-256 for each of `layers` layers.
    pub(crate) fn diff_ids(&self, layers: usize) -> Result<Option<Vec<Sha256>>> {
        let Some(ids) = self.0.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids")) else { return Ok(None) };
        let ids: Vec<&str> = ids.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if ids.len() != layers {
            let message = format!("image config: {} diff_ids for {layers} layers", ids.len());
            return Err(Error::bad_source(message));
        }
        let parse = |id: &&str| id.parse().map_err(|error| Error::bad_source(format!("diff_id {id:?}: {error}")));
        ids.iter().map(parse).collect::<Result<_>>().map(Some)
    }

    /// The config of the converted image, whose layers have these digests. `has_tree`: the last but one is a verity tree.
    pub(crate) fn converted(mut self, diff_ids: &[Sha256], has_tree: bool) -> Vec<u8> {
        let ids: Vec<String> = diff_ids.iter().map(Sha256::to_string).collect();
        self.0.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": ids }));
        let features = self.0.entry("os.features").or_insert_with(|| json!([]));
        if !features.is_array() {
            *features = json!([]);
        }
        if let Value::Array(features) = features
            && !features.iter().any(|feature| feature == OS_FEATURE_EROFS)
        {
            features.push(json!(OS_FEATURE_EROFS));
        }
        // Tools pair the history with the layers, and there are more layers now.
        let created = self.0.get("created").cloned();
        let more = has_tree.then_some("dm-verity tree").into_iter().chain(["merged metadata"]);
        if let Some(Value::Array(history)) = self.0.get_mut("history") {
            for comment in more {
                let mut entry = json!({ "created_by": "ublkimg convert", "comment": comment });
                if let (Some(created), Value::Object(entry)) = (&created, &mut entry) {
                    entry.insert("created".to_owned(), created.clone());
                }
                history.push(entry);
            }
        }
        Value::Object(self.0).to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn unknown_fields_stay_and_layers_change() {
        let text = br#"{"os":"linux","architecture":"arm64","variant":"v8","x":{"y":[1]},"created":"2020-01-01T00:00:00Z",
            "os.features":["other"],"history":[{"created_by":"a"}],"rootfs":{"type":"layers","diff_ids":["sha256:aa"]}}"#;
        let config = Config::parse(text).unwrap();
        assert_eq!(config.diff_ids(2).unwrap_err().kind(), ErrorKind::BadSource);
        assert_eq!(config.diff_ids(1).unwrap_err().kind(), ErrorKind::BadSource);
        assert_eq!(config.platform(&Platform::host()).to_string(), "linux/arm64/v8");
        let ids = [Sha256::of(b"1"), Sha256::of(b"2")];
        let converted: Value = serde_json::from_slice(&config.converted(&ids, false)).unwrap();
        assert_eq!(converted["x"]["y"][0], 1);
        assert_eq!(converted["os.features"], json!(["other", "erofs"]));
        assert_eq!(converted["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
        assert_eq!(converted["history"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn other_systems_are_unsupported() {
        assert_eq!(Config::parse(br#"{"os":"windows"}"#).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(Config::parse(b"[]").unwrap_err().kind(), ErrorKind::BadSource);
    }
}
