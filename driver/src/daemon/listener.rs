//! The server's end of the socket: takes connections, reads one bounded line each, hands it on, writes the answer.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};

use super::protocol::{Answer, Fault, REQUEST_MAX_BYTES, Request};
use crate::error::{Error, ErrorKind, Result};

/// Connections served at once; further ones wait in the kernel's backlog. More than the commands of a busy node's
/// provisioning script, fewer than would hurt.
const CONNECTIONS_MAX: usize = 64;

/// A client must have sent its line by then.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A client must have taken its answer by then.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a request is answered with.
pub(super) struct Reply {
    pub(super) answer: Answer,
    /// The server ends when the client has it.
    pub(super) is_last: bool,
}

/// Binds the socket, replacing one that a dead server left. Only the owner may connect.
///
/// # Errors
/// [`ErrorKind::Io`], naming the path.
pub(super) fn bind(path: &Path) -> Result<UnixListener> {
    // The store's lock is held by now, so no other server of this root lives: a socket that is there is a dead one's.
    let _ = std::fs::remove_file(path);
    let bound = UnixListener::bind(path).and_then(|listener| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    });
    bound.map_err(|error| Error::io(format!("cannot listen on {}", path.display()), error))
}

/// Serves connections until a reply is the last one, or the caller drops the future.
pub(super) async fn serve<H, F>(listener: UnixListener, handle: H)
where
    H: Fn(Request) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send,
{
    let last = Arc::new(Notify::new());
    tokio::select! {
        () = accept(listener, handle, Arc::clone(&last)) => {}
        () = last.notified() => {}
    }
}

async fn accept<H, F>(listener: UnixListener, handle: H, last: Arc<Notify>)
where
    H: Fn(Request) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) if !is_ours(&stream) => tracing::warn!("a connection of another user is refused"),
            Ok((stream, _)) => {
                let (handle, last) = (handle.clone(), Arc::clone(&last));
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, handle, &last).await {
                        tracing::debug!("a client hung up: {error}");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Whether root or our own user is at the other end. The socket's mode says the same, but a mode can be changed.
fn is_ours(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

async fn converse<H, F>(mut stream: UnixStream, handle: H, last: &Notify) -> std::io::Result<()>
where
    H: Fn(Request) -> F,
    F: Future<Output = Reply>,
{
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(REQUEST_MAX_BYTES as u64));
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await??;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => handle(request).await,
        Err(error) => {
            let message = format!("the daemon does not understand the request ({error}): is it of another version?");
            Reply { answer: Answer::Failed(Fault { kind: ErrorKind::Invalid, message }), is_last: false }
        }
    };
    let mut bytes = serde_json::to_vec(&reply.answer)?;
    bytes.push(b'\n');
    let written = async { writer.write_all(&bytes).await.and(writer.shutdown().await) };
    // An answer fits the socket's buffer unless it is a long list; a client that does not read it is not waited for.
    let written = tokio::time::timeout(ANSWER_TIMEOUT, written).await;
    if reply.is_last {
        last.notify_one();
    }
    written?
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader as BlockingReader, Write as _};
    use std::os::unix::net::UnixStream as Client;

    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const NOBODY: u32 = 65534;

    const LONG: Duration = Duration::from_secs(20);

    /// A server whose requests wait to be released.
    struct Server {
        _runtime: tokio::runtime::Runtime,
        begun: Arc<AtomicUsize>,
        release: Arc<Semaphore>,
    }

    impl Server {
        fn start(path: &Path) -> Self {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let (begun, release) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
            let of_handler = (Arc::clone(&begun), Arc::clone(&release));
            let handle = move |_: Request| {
                let (begun, release) = of_handler.clone();
                async move {
                    begun.fetch_add(1, Ordering::SeqCst);
                    release.acquire().await.unwrap().forget();
                    Reply { answer: Answer::Done, is_last: false }
                }
            };
            let listener = runtime.block_on(async { bind(path).unwrap() });
            runtime.spawn(serve(listener, handle));
            Self { _runtime: runtime, begun, release }
        }

        /// Waits until so many requests have begun.
        fn have_begun(&self, requests: usize) {
            let began = std::time::Instant::now();
            while self.begun.load(Ordering::SeqCst) < requests {
                assert!(began.elapsed() < LONG, "{:?} of {requests} requests", self.begun);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn ask(path: &Path) -> std::io::Result<Client> {
        let mut client = Client::connect(path)?;
        let mut line = serde_json::to_vec(&Request::List)?;
        line.push(b'\n');
        client.write_all(&line)?;
        Ok(client)
    }

    /// The answer; empty when the server hung up.
    fn answer(client: &Client) -> std::io::Result<String> {
        client.set_read_timeout(Some(LONG)).unwrap();
        let mut line = String::new();
        BlockingReader::new(client).read_line(&mut line).map(|_| line)
    }

    #[test]
    fn another_user_is_refused_although_the_mode_lets_them_connect() {
        if !ublkimg_tests::skip::is_root() {
            ublkimg_tests::skip!("only root can be another user");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let server = Server::start(&path);
        server.release.add_permits(2);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "the first thing that keeps others out");
        for (path, mode) in [(directory.path(), 0o755), (&path, 0o666)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let ours = answer(&ask(&path).unwrap()).unwrap();
        assert!(ours.contains("done"), "{ours}");
        let of_nobody = std::thread::spawn(move || {
            // The whole process would be another thing: this is the thread's alone.
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).unwrap();
            ask(&path).and_then(|client| answer(&client))
        });
        // The server hangs up, with or without a reset.
        assert_eq!(of_nobody.join().unwrap().unwrap_or_default(), "");
        assert_eq!(server.begun.load(Ordering::SeqCst), 1, "nothing was done for them");
    }

    #[test]
    fn so_many_commands_are_at_work_and_the_next_waits_for_one_to_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let server = Server::start(&path);
        let _at_work: Vec<_> = (0..CONNECTIONS_MAX).map(|_| ask(&path).unwrap()).collect();
        server.have_begun(CONNECTIONS_MAX);
        let waits = ask(&path).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        server.have_begun(CONNECTIONS_MAX);
        assert_eq!(server.begun.load(Ordering::SeqCst), CONNECTIONS_MAX);
        server.release.add_permits(1);
        server.have_begun(CONNECTIONS_MAX + 1);
        server.release.add_permits(CONNECTIONS_MAX);
        let answered = answer(&waits).unwrap();
        assert!(answered.contains("done"), "{answered}");
    }
}
