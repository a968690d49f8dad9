//! One client connection: bytes between its socket and the HTTP server, by way of the link.
//!
//! The HTTP server talks to one end of a small in-memory pipe; a task per connection carries the bytes between the
//! other end and the socket. Up: each piece is held back for the link's delay; the first also for a round trip since
//! the connection came, which is what setting up a TCP connection costs. Down: each piece takes its turn at the
//! bottleneck, is held back for the delay and written to the socket. A permit per byte bounds what is under way down:
//! when the client does not read, its permits run out, and its connection stops asking for turns.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};

use super::link::Link;
use super::stats::Counters;

/// Pieces held back on their way up. The pieces are at most 16 KiB, so 16 MiB a round trip: more than any upload
/// over loopback makes use of.
const PIECES_UP: usize = 1024;

/// Pieces held back on their way down; the window bounds their bytes, this only their number.
const PIECES_DOWN: usize = 4096;

const PIECE_UP_BYTES: usize = 16 * 1024;

/// Turns that the pipe between server and link holds: one being sent, and enough behind it that the server need not be
/// quick.
const PIPE_QUANTA: usize = 4;

/// A connection that is to end counts as drained when the server has written nothing for so long.
const DRAINED_AFTER: Duration = Duration::from_millis(20);

/// Ends a connection from inside a request, and counts what reaches the client.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionHandle {
    counters: Arc<Counters>,
    end: Arc<watch::Sender<Option<End>>>,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// As if the server had said all.
    Close,
    /// With a TCP reset.
    Reset,
}

impl ConnectionHandle {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { counters, end: Arc::new(watch::Sender::new(None)) }
    }

    /// Ends the connection once all that the server has written is sent. (An error in a body would end it too, but the
    /// server then forgets what it holds back.)
    pub(crate) fn end(&self, end: End) {
        self.end.send_replace(Some(end));
    }

    async fn ended_and_idle(&self) {
        // An error means that no request is left that could end it.
        if self.end.subscribe().wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(DRAINED_AFTER).await;
    }

    fn is_reset(&self) -> bool {
        *self.end.borrow() == Some(End::Reset)
    }
}

/// A piece on its way, and when it arrives.
struct Piece {
    due: Instant,
    bytes: Bytes,
}

/// Carries `socket` over `link` in a task of its own, until it ends or `down` completes; the result is the server's
/// end.
pub(crate) fn carry(
    socket: TcpStream,
    link: Arc<Link>,
    handle: ConnectionHandle,
    down: impl Future<Output = ()> + Send + 'static,
) -> DuplexStream {
    let (server_end, wire_end) = tokio::io::duplex(PIPE_QUANTA * link.quantum_bytes());
    tokio::spawn(run(socket, wire_end, link, handle, down));
    server_end
}

async fn run(
    mut socket: TcpStream,
    wire: DuplexStream,
    link: Arc<Link>,
    handle: ConnectionHandle,
    down: impl Future<Output = ()> + Send,
) {
    // Small answers must not wait for the acknowledgement of earlier ones; an error only makes them slower.
    drop(socket.set_nodelay(true));
    let (from_server, to_server) = tokio::io::split(wire);
    let reset = {
        let (from_client, to_client) = socket.split();
        let up = async {
            // The end of the client's requests does not end the answers.
            drop(carry_up(from_client, to_server, &link).await);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = carry_down(from_server, to_client, &link, &handle) => handle.is_reset(),
            () = up => false,
            () = down => true,
        }
    };
    if reset {
        drop(socket.set_zero_linger());
    }
}

async fn carry_up(
    mut from_client: impl AsyncRead + Unpin,
    mut to_server: impl AsyncWrite + Unpin,
    link: &Link,
) -> io::Result<()> {
    let open_at = Instant::now() + 2 * link.delay();
    let (sender, mut receiver) = mpsc::channel::<Piece>(PIECES_UP);
    let read = async {
        loop {
            let mut buffer = BytesMut::with_capacity(PIECE_UP_BYTES);
            if from_client.read_buf(&mut buffer).await? == 0 {
                break;
            }
            let due = Instant::now().max(open_at) + link.delay();
            if sender.send(Piece { due, bytes: buffer.freeze() }).await.is_err() {
                break;
            }
        }
        drop(sender);
        Ok(())
    };
    let write = async {
        while let Some(piece) = receiver.recv().await {
            link.alarm.sleep_until(piece.due).await;
            to_server.write_all(&piece.bytes).await?;
        }
        to_server.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}

async fn carry_down(
    mut from_server: impl AsyncRead + Unpin,
    mut to_client: impl AsyncWrite + Unpin,
    link: &Link,
    handle: &ConnectionHandle,
) -> io::Result<()> {
    let window = Semaphore::new(link.window_bytes());
    let (sender, mut receiver) = mpsc::channel::<Piece>(PIECES_DOWN);
    let read = async {
        let mut departed = Instant::now();
        loop {
            let mut buffer = BytesMut::with_capacity(link.quantum_bytes());
            let waited = {
                let limit = link.quantum_bytes() as u64;
                let mut limited = (&mut from_server).take(limit);
                let mut reading = std::pin::pin!(limited.read_buf(&mut buffer));
                let (len, waited) = match futures_util::poll!(reading.as_mut()) {
                    std::task::Poll::Ready(len) => (len?, false),
                    std::task::Poll::Pending => tokio::select! {
                        len = reading => (len?, true),
                        () = handle.ended_and_idle() => break,
                    },
                };
                if len == 0 {
                    break;
                }
                let count = u32::try_from(len).map_err(io::Error::other)?;
                let blocked = window.available_permits() < len;
                window.acquire_many(count).await.map_err(io::Error::other)?.forget();
                waited || blocked
            };
            // Data that was waiting while the last piece was being sent follows it without a gap, however late this
            // task was woken; data that came later, or had to wait for the client, has no claim on the past.
            let ready_at = if waited { Instant::now() } else { departed };
            departed = link.transmit(ready_at, buffer.len()).await;
            if sender.send(Piece { due: departed + link.delay(), bytes: buffer.freeze() }).await.is_err() {
                break;
            }
        }
        drop(sender);
        Ok(())
    };
    let write = async {
        while let Some(piece) = receiver.recv().await {
            link.alarm.sleep_until(piece.due).await;
            to_client.write_all(&piece.bytes).await?;
            handle.counters.delivered();
            window.add_permits(piece.bytes.len());
        }
        if handle.is_reset() {
            return Ok(());
        }
        to_client.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}
