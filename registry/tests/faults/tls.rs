//! Certificates are verified, against the roots that `SSL_CERT_FILE` names. The TLS server is openssl's.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ublkimg_registry::{ClientOptions, ErrorKind};

use crate::fake::{Fake, answer, blob, options};
use crate::fault_row::FaultRow;

/// Tells the child process where the TLS server is.
const SERVER: &str = "UBLKIMG_TEST_TLS_SERVER";

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn openssl(dir: &Path, arguments: &str) -> Command {
    let mut command = Command::new("openssl");
    command.args(arguments.split(' ')).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A server of the files in `dir` with a self-signed certificate for 127.0.0.1, `cert.pem`; `None` without openssl.
fn start(dir: &Path) -> Option<(Server, String)> {
    let key = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem -days 2 \
        -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    match openssl(dir, key).status() {
        Ok(status) => assert!(status.success()),
        Err(error) => {
            println!("SKIP: openssl cannot be run: {error}");
            return None;
        }
    }
    let authority = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let serve = format!("s_server -accept {authority} -cert cert.pem -key key.pem -WWW -quiet");
    let server = Server(openssl(dir, &serve).spawn().unwrap());
    for _ in 0..100 {
        if std::net::TcpStream::connect(&authority).is_ok() {
            return Some((server, authority));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("openssl s_server does not start");
}

/// What a blob read says that is redirected to `https://server/blob`.
async fn read(server: String) -> Result<(), (ErrorKind, String)> {
    let (bytes, digest) = blob(1000);
    let fake = Fake::start(move |_, _| answer(307, &[("Location", &format!("https://{server}/blob"))], "")).await;
    let once = ClientOptions { retry_deadline: Duration::ZERO, ..options() };
    match fake.open(&once).await.blob_range(&digest, 5..900).await {
        Ok(read) => {
            assert_eq!(read, bytes[5..900]);
            Ok(())
        }
        Err(error) => Err((error.kind(), error.to_string())),
    }
}

#[tokio::test]
async fn certificates_are_verified() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("blob"), blob(1000).0).unwrap();
    let Some((_server, authority)) = start(dir.path()) else { return };
    let fault = FaultRow::begins("a certificate that does not verify");
    let (kind, text) = read(authority.clone()).await.unwrap_err();
    fault.ends("a request fails at once and says why");
    // A machine without any root certificates cannot even begin.
    assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::Invalid), "{text}");
    assert!(text.contains("certificate"), "{text}");

    // The variable counts for a whole process.
    let this = std::env::current_exe().unwrap();
    let child = Command::new(this)
        .args(["--exact", "tls::with_the_right_root", "--ignored"])
        .env(SERVER, authority)
        .env("SSL_CERT_FILE", dir.path().join("cert.pem"))
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
}

#[tokio::test]
#[ignore = "the other half of certificates_are_verified, which runs it"]
async fn with_the_right_root() {
    let Ok(server) = std::env::var(SERVER) else { return };
    read(server).await.unwrap();
}
