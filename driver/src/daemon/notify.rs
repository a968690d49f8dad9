//! Tells the service manager that the daemon serves: the protocol of sd_notify(3), one datagram.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// How often it is looked whether the daemon serves.
const POLL: Duration = Duration::from_millis(20);

/// Waits until the daemon serves, and says so; does nothing without a service manager that wants to know.
pub(super) async fn when(serves: impl Fn() -> bool) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return };
    while !serves() {
        tokio::time::sleep(POLL).await;
    }
    if let Err(error) = ready(&address) {
        tracing::warn!("the service manager is not told that the daemon serves: {error}");
    }
}

/// `address` is a path, or an abstract name behind an `@`.
fn ready(address: &OsStr) -> std::io::Result<()> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_is_told_by_path_or_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("ublkimg-notify-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str().to_owned()),
            (UnixDatagram::bind_addr(&by_name).unwrap(), format!("@{name}").into()),
        ] {
            ready(&address).unwrap();
            let mut text = [0; 16];
            let len = socket.recv(&mut text).unwrap();
            assert_eq!(&text[..len], b"READY=1");
        }
        assert!(ready(OsStr::new("/nonexistent/notify")).is_err());
    }
}
