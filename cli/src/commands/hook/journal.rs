//! One line for the journal (systemd.journal-fields(7)), where there is one.

use std::os::unix::net::UnixDatagram;

const SOCKET: &str = "/run/systemd/journal/socket";

/// Says that something failed. A host without a journal, or with a full one, is no error.
pub(super) fn error(text: &str) {
    let send = || -> std::io::Result<usize> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to(message(text).as_bytes(), SOCKET)
    };
    let _ = send();
}

/// In the journal's own protocol a field ends with its line.
fn message(text: &str) -> String {
    format!("PRIORITY=3\nSYSLOG_IDENTIFIER=ublkimg\nMESSAGE={}\n", text.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_field_a_line() {
        assert_eq!(message("a\nPRIORITY=0"), "PRIORITY=3\nSYSLOG_IDENTIFIER=ublkimg\nMESSAGE=a PRIORITY=0\n");
    }
}
