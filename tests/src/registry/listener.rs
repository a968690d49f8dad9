//! The listening socket: accepts clients onto the link, and can go away and come back on the same port.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::DuplexStream;
use tokio::net::TcpListener;

use super::connection::{ConnectionHandle, carry};
use super::faults::Faults;
use super::link::Link;
use super::stats::Counters;

/// Time between two attempts to listen again on a port that somebody else took meanwhile.
const REBIND_PAUSE: Duration = Duration::from_millis(20);

pub(crate) struct LinkListener {
    socket: Option<TcpListener>,
    address: SocketAddr,
    link: Arc<Link>,
    faults: Arc<Faults>,
    counters: Arc<Counters>,
}

impl LinkListener {
    /// Must be called in a runtime.
    pub(crate) fn new(
        socket: std::net::TcpListener,
        link: Arc<Link>,
        faults: Arc<Faults>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let address = socket.local_addr()?;
        Ok(Self { socket: Some(listen(socket)?), address, link, faults, counters })
    }

    /// `None`: the registry went down meanwhile.
    async fn accept_one(&mut self) -> io::Result<Option<(DuplexStream, ConnectionHandle)>> {
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => listen(std::net::TcpListener::bind(self.address)?)?,
        };
        // Going down drops the socket here, so clients are refused by the kernel and not by us.
        let (stream, _) = tokio::select! {
            accepted = socket.accept() => accepted?,
            () = self.faults.until_down() => return Ok(None),
        };
        self.socket = Some(socket);
        self.counters.count_connection();
        let handle = ConnectionHandle::new(Arc::clone(&self.counters));
        let faults = Arc::clone(&self.faults);
        let down = async move { faults.until_down().await };
        Ok(Some((carry(stream, Arc::clone(&self.link), handle.clone(), down), handle)))
    }
}

fn listen(socket: std::net::TcpListener) -> io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

impl Listener for LinkListener {
    type Io = DuplexStream;
    type Addr = ConnectionHandle;

    async fn accept(&mut self) -> (DuplexStream, ConnectionHandle) {
        loop {
            if self.faults.is_down() {
                self.socket = None;
                self.faults.until_up().await;
            }
            match self.accept_one().await {
                Ok(Some(accepted)) => return accepted,
                Ok(None) => (),
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    tokio::time::sleep(REBIND_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<ConnectionHandle> {
        Ok(ConnectionHandle::new(Arc::clone(&self.counters)))
    }
}

impl Connected<IncomingStream<'_, LinkListener>> for ConnectionHandle {
    fn connect_info(stream: IncomingStream<'_, LinkListener>) -> Self {
        stream.remote_addr().clone()
    }
}
