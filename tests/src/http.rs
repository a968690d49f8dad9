//! A plain HTTP client for tests: blocking, one connection, nothing hidden.
//!
//! It shares no code with the registry crate, so the test registry is not tested by its own mirror image.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A connection to a server.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

/// Status, headers (names in lower case) and body.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// By name in lower case; the last of a name counts.
    pub headers: BTreeMap<String, String>,
    /// The body, as long as Content-Length says.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// The server is not there.
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self { stream: BufReader::with_capacity(256 * 1024, stream) })
    }

    /// The socket, for a test that reads by itself.
    pub fn stream(&mut self) -> &mut BufReader<TcpStream> {
        &mut self.stream
    }

    /// Sends a request and reads the head of its answer; the body stays unread.
    ///
    /// # Errors
    ///
    /// The connection broke, or the answer is not HTTP.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Answer> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: registry\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        if !matches!(method, "GET" | "HEAD") {
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let stream = self.stream.get_mut();
        stream.write_all(&[request.as_bytes(), body].concat())?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer");
        let status = self.line()?.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
        let mut headers = BTreeMap::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(bad)?;
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        Ok(Answer { status, headers, body: Vec::new() })
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    ///
    /// The connection broke, the answer is not HTTP or shorter than its Content-Length. What came of the body is lost.
    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Answer> {
        let mut answer = self.send(method, path, headers, body)?;
        if method != "HEAD" && answer.status != 204 {
            let length = answer.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
            answer.body = vec![0; length];
            self.stream.read_exact(&mut answer.body)?;
        }
        Ok(answer)
    }

    /// GET without headers.
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.request("GET", path, &[], &[])
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}
