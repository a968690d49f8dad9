//! TLS before a server of a test, with certificates that openssl makes for it. What goes through is carried on as it is, so the test
//! registry need not know of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// A client that was refused gets so long to read why before its connection is dropped.
const LINGER: Duration = Duration::from_secs(1);

/// How openssl makes a key.
const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

/// What `openssl ca` wants to be told, which alone can sign for other times than from now on.
const SIGNING: &str = "[ca]\ndefault_ca=ours\n[ours]\ndatabase=signed\nnew_certs_dir=.\nserial=serial\npolicy=names\n\
    default_md=sha256\nunique_subject=no\n[names]\ncommonName=supplied\n[server]\nsubjectAltName=IP:127.0.0.1\n\
    basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n";

/// Somebody who signs certificates. Its files lie in its directory: `ca.pem`, and what [`Authority::issue`] makes.
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// Whether openssl is installed, which makes the certificates.
    pub fn is_possible() -> bool {
        Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_ok()
    }

    /// A new one in the new directory `dir`.
    ///
    /// # Errors
    ///
    /// The directory cannot be written, or openssl fails.
    pub fn new(dir: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir(&dir)?;
        let authority = Self { dir };
        authority.request("ca", &[])?;
        Ok(authority)
    }

    /// Its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Signs a certificate for 127.0.0.1, good for servers and clients; returns it and its key.
    ///
    /// # Errors
    ///
    /// As [`Authority::new`].
    pub fn issue(&self, name: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let extensions = [
            "subjectAltName=IP:127.0.0.1",
            "basicConstraints=critical,CA:FALSE",
            "extendedKeyUsage=serverAuth,clientAuth",
        ];
        let mut more = vec!["-CA", "ca.pem", "-CAkey", "ca.key"];
        more.extend(extensions.iter().flat_map(|extension| ["-addext", extension]));
        self.request(name, &more)?;
        Ok((self.dir.join(format!("{name}.pem")), self.dir.join(format!("{name}.key"))))
    }

    /// The same for servers alone, valid from one time to another, each like `20300101000000Z`.
    ///
    /// # Errors
    ///
    /// As [`Authority::new`].
    pub fn issue_for_a_time(&self, name: &str, from: &str, to: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let (certificate, key) = (format!("{name}.pem"), format!("{name}.key"));
        std::fs::write(self.dir.join("signing.conf"), SIGNING)?;
        std::fs::write(self.dir.join("signed"), "")?;
        let subject = format!("/CN={name}");
        self.openssl(&format!("req {NEW_KEY}"), &["-subj", &subject, "-keyout", &key, "-out", "request.pem"])?;
        let by =
            "ca -batch -notext -create_serial -config signing.conf -extensions server -cert ca.pem -keyfile ca.key";
        self.openssl(by, &["-in", "request.pem", "-out", &certificate, "-startdate", from, "-enddate", to])?;
        Ok((self.dir.join(certificate), self.dir.join(key)))
    }

    fn request(&self, name: &str, more: &[&str]) -> anyhow::Result<()> {
        let (subject, key, certificate) = (format!("/CN={name}"), format!("{name}.key"), format!("{name}.pem"));
        let mut words = vec!["-subj", &subject, "-keyout", &key, "-out", &certificate];
        words.extend(more);
        self.openssl(&format!("req -x509 -days 2 {NEW_KEY}"), &words)
    }

    fn openssl(&self, command: &str, words: &[&str]) -> anyhow::Result<()> {
        let output = Command::new("openssl")
            .args(command.split(' '))
            .args(words)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()
            .context("openssl")?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// A running end of TLS; stops when dropped.
pub struct TlsFront {
    address: SocketAddr,
    runtime: Option<Runtime>,
}

impl TlsFront {
    /// Listens on loopback with this certificate and key, and carries what comes to `to`. With `clients`, those who show no
    /// certificate of that authority are refused.
    ///
    /// # Errors
    ///
    /// The files are no certificate and key, or it cannot listen.
    pub fn start(
        to: SocketAddr,
        (certificate, key): &(PathBuf, PathBuf),
        clients: Option<&Authority>,
    ) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(certificates(&authority.certificate())?);
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder.with_single_cert(certificates(certificate)?, PrivateKeyDer::from_pem_file(key)?)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(acceptor.clone(), client, to));
            }
        });
        Ok(Self { address, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        // Not the runtime's own drop, which would panic where a test is asynchronous.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn carry(acceptor: TlsAcceptor, client: TcpStream, to: SocketAddr) {
    match acceptor.accept(client).into_fallible().await {
        Ok(mut client) => {
            let Ok(mut server) = TcpStream::connect(to).await else { return };
            // Either side may end it in any way.
            drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
        }
        Err((_, mut refused)) => {
            // Dropped with bytes unread it would be reset, and the alert that says why could be lost.
            let mut rest = Vec::new();
            drop(tokio::time::timeout(LINGER, refused.read_to_end(&mut rest)).await);
        }
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    Ok(CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?)
}
