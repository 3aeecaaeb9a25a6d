//! An HTTP client that keeps its one connection, and notices when it ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// An answer takes moments; a migration in between takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// One kept connection to a server.
#[derive(Debug)]
pub struct Http {
    stream: BufReader<TcpStream>,
}

impl Http {
    /// Connects.
    pub fn connect(address: &str) -> io::Result<Self> {
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// One request and its answer's body. A connection that is gone is an error.
    pub fn get(&mut self, path: &str) -> io::Result<String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        if !status.starts_with("HTTP/1.1 200") {
            return Err(io::Error::other(format!("the server answered {status}")));
        }
        let mut length = None;
        let mut chunked = false;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().ok();
            }
            chunked |= line.starts_with("transfer-encoding:") && line.ends_with("chunked");
        }
        let body = if chunked {
            self.chunks()?
        } else {
            self.bytes(length.unwrap_or(0))?
        };
        String::from_utf8(body).map_err(io::Error::other)
    }

    /// A number of a JSON answer.
    #[track_caller]
    pub fn number(&mut self, path: &str, key: &str) -> u64 {
        let body = self
            .get(path)
            .unwrap_or_else(|error| panic!("GET {path}: {error}"));
        let value: serde_json::Value =
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{body}: {error}"));
        match &value[key] {
            // One number for each thread: the slowest tells whether all go on.
            serde_json::Value::Array(numbers) => numbers
                .iter()
                .filter_map(serde_json::Value::as_u64)
                .min()
                .unwrap_or(0),
            number => number
                .as_u64()
                .unwrap_or_else(|| panic!("no {key} in {body}")),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let length = usize::from_str_radix(&self.line()?, 16).map_err(io::Error::other)?;
            body.extend(self.bytes(length)?);
            self.line()?;
            if length == 0 {
                return Ok(body);
            }
        }
    }
}
