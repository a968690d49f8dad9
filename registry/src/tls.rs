//! Why a registry and this host could not agree on a TLS connection, and who mends it how.
//!
//! None of this goes away by asking again: the certificates, the clock and the configuration of both sides are as they are. So
//! such an error ends a request at once, where a broken connection would be tried again until the deadline.

use std::error::Error;
use std::{io, iter};

use rustls::{AlertDescription as Alert, CertificateError as Certificate, Error as TlsError};

/// What is wrong and the remedy, in words that go behind the registry's name, where `error` comes from TLS; `None` where it does not,
/// or where the other side broke off for reasons of its own.
pub(crate) fn trouble(error: &(dyn Error + 'static)) -> Option<String> {
    match tls_error(error)? {
        TlsError::InvalidCertificate(of_server) => Some(of_certificate(of_server)),
        TlsError::AlertReceived(Alert::CertificateRequired) => {
            Some("wants a client certificate; name one with client in hosts.toml".into())
        }
        TlsError::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError),
        ) => Some(format!("refuses the client certificate ({alert:?}); name another with client in hosts.toml")),
        TlsError::AlertReceived(
            alert @ (Alert::HandshakeFailure | Alert::ProtocolVersion | Alert::InsufficientSecurity),
        ) => Some(format!(
            "and this host have no version of TLS and no ciphers in common ({alert:?}); it must offer TLS 1.2 or 1.3"
        )),
        TlsError::PeerIncompatible(why) => Some(format!(
            "and this host have no version of TLS and no ciphers in common ({why:?}); it must offer TLS 1.2 or 1.3"
        )),
        // The first bytes of its answer are none of TLS.
        TlsError::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            Some("speaks plain HTTP, not TLS; say so with http:// in hosts.toml, or with --plain-http".into())
        }
        _ => None,
    }
}

fn of_certificate(error: &Certificate) -> String {
    match error {
        // The second: the authority that is believed has the name of the one that signed, but another key.
        Certificate::UnknownIssuer | Certificate::BadSignature => {
            "shows a certificate, but nobody whom this host believes has signed it; name who has with ca in hosts.toml"
                .into()
        }
        Certificate::Expired | Certificate::ExpiredContext { .. } => {
            "shows a certificate that has expired; it needs a new one, unless this host's clock is wrong".into()
        }
        Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
            "shows a certificate that is not valid yet; set this host's clock, unless it is right".into()
        }
        Certificate::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
            format!("shows a certificate for {} only; call it so with server in hosts.toml", presented.join(", "))
        }
        Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
            "shows a certificate for another name; it needs one for its own".into()
        }
        Certificate::Revoked => "shows a certificate that was revoked; it needs a new one".into(),
        other => format!("shows a certificate that cannot be used ({other:?}); it needs another one"),
    }
}

/// The error of TLS among the causes of `error`.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a TlsError> {
    iter::successors(Some(error), |error| cause(*error)).find_map(|error| error.downcast_ref())
}

fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        // The `source` of what wraps it would be the source of that error, and pass over the error itself.
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(error: TlsError) -> io::Error {
        // As tokio-rustls and then hyper-rustls do.
        io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error))
    }

    #[test]
    fn an_error_of_tls_is_found_below_others() {
        for certificate in [Certificate::BadSignature, Certificate::UnknownIssuer] {
            let error = TlsError::InvalidCertificate(certificate);
            for said in [trouble(&error), trouble(&wrapped(error.clone()))] {
                assert!(said.as_ref().is_some_and(|said| said.contains("ca in hosts.toml")), "{said:?}");
            }
        }
    }

    #[test]
    fn what_may_pass_is_none() {
        let broken = [io::Error::from(io::ErrorKind::ConnectionReset), io::Error::other("odd")];
        assert!(broken.iter().all(|error| trouble(error).is_none()));
        for may_pass in [TlsError::AlertReceived(Alert::InternalError), TlsError::DecryptError] {
            assert_eq!(trouble(&wrapped(may_pass)), None);
        }
    }
}
