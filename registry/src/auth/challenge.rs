//! `WWW-Authenticate` (RFC 9110, section 11.6.1), as far as registries use it.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// How the registry wants to be convinced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with every request (RFC 7617).
    Basic,
    /// A token from a token service (docs.docker.com/registry/spec/auth/token).
    Bearer { realm: String, service: Option<String>, scopes: Vec<String> },
}

impl Challenge {
    /// The challenge of a 401, Bearer before Basic where both are offered.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let all: Vec<Self> = values.flat_map(parse).collect();
        all.iter().find(|challenge| **challenge != Self::Basic).or(all.first()).cloned()
    }
}

/// One header value: schemes, each with `key=value` or `key="value"` pairs, all divided by commas.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word_len = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        if word_len == 0 {
            break;
        }
        let (word, after) = rest.split_at(word_len);
        let after = after.trim_start_matches([' ', '\t']);
        match after.strip_prefix('=') {
            Some(value) => {
                let (value, after) = take_value(value.trim_start_matches([' ', '\t']));
                if let Some((_, pairs)) = found.last_mut() {
                    pairs.push((word.to_ascii_lowercase(), value));
                }
                rest = after;
            }
            None => {
                found.push((word.to_ascii_lowercase(), Vec::new()));
                rest = after;
            }
        }
    }
    found.into_iter().filter_map(|(scheme, pairs)| challenge(&scheme, &pairs)).collect()
}

fn challenge(scheme: &str, pairs: &[(String, String)]) -> Option<Challenge> {
    let value = |key: &str| pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: value("realm")?,
            service: value("service"),
            scopes: value("scope").unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect(),
        }),
        _ => None,
    }
}

/// A token or a quoted string, and what follows it.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scopes: &[&str]) -> Challenge {
        let scopes = scopes.iter().map(|&scope| scope.to_owned()).collect();
        Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned), scopes }
    }

    #[test]
    fn what_registries_send() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let expected =
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), &["repository:a/b:pull,push"]);
        assert_eq!(parse(docker), [expected]);
        assert_eq!(parse(r#"Basic realm="Registry Realm""#), [Challenge::Basic]);
        assert_eq!(parse(r#"bearer  Realm=https://h/t , scope="aws x""#), [bearer("https://h/t", None, &["aws", "x"])]);
        let both = r#"Negotiate abc, Basic realm="x, y=\"z\"", Bearer realm="r""#;
        assert_eq!(parse(both), [Challenge::Basic, bearer("r", None, &[])]);
    }

    #[test]
    fn rubbish_is_no_challenge() {
        for text in ["", ",", "=", "Bearer", "Bearer service=x", "realm=\"x", "\"", "Bearer realm", "é é", "a=b=c,d"]
        {
            assert_eq!(parse(text), [], "{text}");
        }
    }

    #[test]
    fn bearer_wins() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Basic realm=x".parse().unwrap());
        headers.append(WWW_AUTHENTICATE, "Bearer realm=y".parse().unwrap());
        assert_eq!(Challenge::of(&headers), Some(bearer("y", None, &[])));
        assert_eq!(Challenge::of(&HeaderMap::new()), None);
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_parsed(text in "([ -~\u{e9}]|Bearer |realm=|\"|,){0,40}") {
            let _ = parse(&text);
        }
    }
}
