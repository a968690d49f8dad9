//! An HTTP/1.1 server that answers each request as the test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use ublkimg_registry::{ClientOptions, Digest, Repository};

/// One request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    /// Names in lower case.
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What to answer: bytes, and what happens to the connection.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) delay: Duration,
    pub(crate) bytes: Vec<u8>,
    pub(crate) then: Then,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Then {
    /// Another request may follow.
    Keep,
    Close,
    /// Nothing more, but no end either.
    Hang,
    /// The rest one byte at a time with a pause before each.
    Drip(Vec<u8>, Duration),
    /// Zeros until the client has enough.
    Forever,
}

pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Answer {
    let body = body.as_ref();
    let mut head = format!("HTTP/1.1 {status} X\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let framed = headers.iter().any(|(name, _)| matches!(*name, "Content-Length" | "Transfer-Encoding"));
    if !framed {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    Answer { delay: Duration::ZERO, bytes: [head.as_bytes(), body].concat(), then: Then::Keep }
}

impl Answer {
    pub(crate) fn then(self, then: Then) -> Self {
        Self { then, ..self }
    }

    pub(crate) fn after(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }
}

/// The lawful answer to a ranged request.
pub(crate) fn partial(request: &Seen, blob: &[u8]) -> Answer {
    let Some((start, end)) = range_of(request) else { return answer(200, &[], blob) };
    answer(206, &[("Content-Range", &format!("bytes {start}-{}/{}", end - 1, blob.len()))], &blob[start..end])
}

/// The half-open range that the request asks for.
pub(crate) fn range_of(request: &Seen) -> Option<(usize, usize)> {
    let (first, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().unwrap(), last.parse::<usize>().unwrap() + 1))
}

type Handler = dyn Fn(&Seen, usize) -> Answer + Send + Sync;

/// The server; it ends with the test's runtime.
pub(crate) struct Fake {
    pub(crate) authority: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    /// `handler` gets each request and its number, from 0.
    pub(crate) async fn start(handler: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (handler, log): (Arc<Handler>, _) = (Arc::new(handler), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(serve(connection, Arc::clone(&handler), Arc::clone(&log)));
            }
        });
        Self { authority, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    pub(crate) async fn open(&self, options: &ClientOptions) -> Repository {
        self.open_as("app/web:v1", options).await
    }

    pub(crate) async fn open_as(&self, name: &str, options: &ClientOptions) -> Repository {
        Repository::open(&format!("{}/{name}", self.authority).parse().unwrap(), options).await.unwrap()
    }
}

/// Nobody's credentials, and limits that a busy machine does not reach.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        auth_file: Some("/dev/null".into()),
        retry_deadline: Duration::from_secs(20),
        ..ClientOptions::default()
    }
}

/// The same with limits that a test can wait for.
pub(crate) fn hasty() -> ClientOptions {
    let short = Duration::from_millis(400);
    ClientOptions { connect_timeout: short, response_timeout: short, idle_timeout: short, ..options() }
}

/// A blob and its digest.
pub(crate) fn blob(len: usize) -> (Vec<u8>, Digest) {
    let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    let digest = Digest::of(&bytes);
    (bytes, digest)
}

async fn serve(connection: TcpStream, handler: Arc<Handler>, log: Arc<Mutex<Vec<Seen>>>) {
    let mut connection = BufReader::new(connection);
    while let Some(request) = read_request(&mut connection).await {
        let number = {
            let mut log = log.lock().unwrap();
            log.push(request.clone());
            log.len() - 1
        };
        let answer = handler(&request, number);
        sleep(answer.delay).await;
        if connection.write_all(&answer.bytes).await.is_err() {
            return;
        }
        match answer.then {
            Then::Keep => {}
            Then::Close => return,
            Then::Hang => sleep(Duration::from_secs(60)).await,
            Then::Drip(bytes, pause) => {
                for byte in bytes {
                    sleep(pause).await;
                    if connection.write_all(&[byte]).await.is_err() {
                        return;
                    }
                }
            }
            Then::Forever => while connection.write_all(&[0; 1 << 16]).await.is_ok() {},
        }
    }
}

async fn read_request(connection: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let pairs = lines.filter_map(|line| line.split_once(": "));
    let headers: HashMap<_, _> = pairs.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let len = headers.get("content-length").map_or(0, |len| len.parse().unwrap());
    let mut body = vec![0; len];
    connection.read_exact(&mut body).await.ok()?;
    Some(Seen { method, target, headers, body })
}
