//! Credential helpers: `docker-credential-NAME get`, the registry on its stdin, JSON on its stdout
//! (github.com/docker/docker-credential-helpers).

use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::credentials::{self, Credentials};
use crate::error::{Error, Result};

/// Helpers that ask a cloud service take a second or two; one that asks a person at a screen cannot work here.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// A token of a cloud service is a few KiB.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
/// The helper's word for "nothing on file", with exit code 1.
const NOTHING: &str = "credentials not found";
/// The user name that marks the secret as an identity token.
const IDENTITY_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// What the helper `name` has for `server`; `None` = nothing.
///
/// # Errors
/// `Invalid` when it cannot be run, fails, takes too long or answers with rubbish. What it wrote is not repeated: it may
/// be the secret.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credentials>> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !name.bytes().all(plain) {
        return Err(Error::invalid(format!("{name:?} is not the name of a credential helper")));
    }
    ask(&format!("docker-credential-{name}"), server, TIME_LIMIT).await
}

async fn ask(program: &str, server: &str, limit: Duration) -> Result<Option<Credentials>> {
    let failed = |why: &dyn std::fmt::Display| Error::invalid(format!("{program} has no answer for {server}: {why}"));
    let (success, output) = match timeout(limit, run(program, server)).await {
        Ok(done) => done.map_err(|cause| failed(&cause).with_source(cause))?,
        Err(_) => return Err(failed(&format_args!("it took longer than {} s", limit.as_secs_f32()))),
    };
    if !success {
        let text = String::from_utf8_lossy(&output);
        return if text.contains(NOTHING) { Ok(None) } else { Err(failed(&"it failed")) };
    }
    let answer: Answer = serde_json::from_slice(&output).map_err(|_| failed(&"its output is not what it should be"))?;
    Ok(Some(match answer.username.as_str() {
        IDENTITY_USER => Credentials::Identity { token: answer.secret },
        _ => Credentials::Password { user: answer.username, password: answer.secret },
    }))
}

async fn run(program: &str, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("get")
        .envs(credentials::own_home().map(|home| ("HOME", home)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(server.as_bytes()).await {
            // It ended without reading: its exit code tells.
            Err(cause) if cause.kind() == std::io::ErrorKind::BrokenPipe => {}
            other => other?,
        }
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn answer_of(script: &str, limit: Duration) -> Result<Option<Credentials>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-test");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        loop {
            match ask(path.to_str().unwrap(), "h.io", limit).await {
                // A process that another test starts at this moment still holds the script open for writing.
                Err(error) if error.to_string().ends_with("(os error 26)") => tokio::task::yield_now().await,
                other => return other,
            }
        }
    }

    #[tokio::test]
    async fn answers() {
        let limit = Duration::from_secs(10);
        let echo = r#"read -r server; printf '{"ServerURL":"%s","Username":"%s","Secret":"p"}' "$server" "$1-$server""#;
        let expected = Credentials::Password { user: "get-h.io".to_owned(), password: "p".to_owned() };
        assert_eq!(answer_of(echo, limit).await.unwrap(), Some(expected));
        let token = r#"echo '{"ServerURL":"h.io","Username":"<token>","Secret":"T"}'"#;
        let expected = Credentials::Identity { token: "T".to_owned() };
        assert_eq!(answer_of(token, limit).await.unwrap(), Some(expected));
        let nothing = "echo credentials not found in native keychain; exit 1";
        assert_eq!(answer_of(nothing, limit).await.unwrap(), None);
    }

    #[tokio::test]
    async fn trouble_is_said_without_the_output() {
        let limit = Duration::from_millis(300);
        for (script, why) in [
            ("echo SECRET; exit 1", "it failed"),
            ("echo SECRET", "its output is not what it should be"),
            ("exec sleep 60", "it took longer than 0.3 s"),
            ("exec yes SECRET", "it failed"),
        ] {
            let error = answer_of(script, limit).await.unwrap_err();
            assert!(error.to_string().contains("docker-credential-test has no answer for h.io: "), "{error}");
            assert!(error.to_string().ends_with(why), "{script}: {error}");
            assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
        }
    }
}
