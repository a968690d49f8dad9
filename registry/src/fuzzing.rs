//! Doors for the fuzz targets in `fuzz/`: what they feed is not public otherwise. Not part of the program.

use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderName, HeaderValue, LINK, WWW_AUTHENTICATE};
use url::Url;

use crate::auth::TokenAnswer;
use crate::auth::challenge::Challenge;
use crate::remote::blob_read::parse_content_range;
use crate::remote::referrers::next_target;

/// What a registry says beside its documents: headers, and the answer of its token service.
///
/// # Panics
/// If what is read is more than was there.
pub fn http(data: &[u8]) {
    if let Ok(answer) = serde_json::from_slice::<TokenAnswer>(data) {
        let _ = answer.grant("token service", true);
    }
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let only = |name: HeaderName| HeaderMap::from_iter([(name, value.clone())]);
    if let Some(Challenge::Bearer { realm, service, scopes }) = Challenge::of(&only(WWW_AUTHENTICATE)) {
        let scopes: usize = scopes.iter().map(String::len).sum();
        assert!(realm.len() + service.map_or(0, |service| service.len()) + scopes < data.len());
        let _ = Url::parse(&realm);
    }
    if let Some(range) = only(CONTENT_RANGE)[CONTENT_RANGE].to_str().ok().and_then(parse_content_range) {
        assert!(range.start < range.end);
        let again = format!("bytes {}-{}/{}", range.start, range.end - 1, range.end);
        assert_eq!(parse_content_range(&again), Some(range));
    }
    let base = Url::parse("https://registry.example/v2/app/referrers/x").expect("an address");
    let _ = next_target(&only(LINK)).map(|target| base.join(target));
}

/// What registries send.
#[must_use]
pub fn http_seeds() -> Vec<Vec<u8>> {
    [
        r#"Bearer realm="https://h/token",service="s",scope="repository:a/b:pull,push aws""#,
        r#"Negotiate abc, Basic realm="x, y=\"z\"", Bearer realm="r""#,
        "bytes 5-9/10",
        r#"</v2/app/referrers/x?n=2>; rel="next""#,
        r#"{"token":"t","access_token":"a","expires_in":300}"#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
