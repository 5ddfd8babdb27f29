//! What is shown of a running server (`--monitor`).

mod auth;
mod dashboard;
mod folder;
mod health;
mod hostile;
mod numbers;
mod page;
mod prometheus;
mod showing;
#[cfg(feature = "remote")]
mod stores;
mod top;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::support::PATIENCE;
use crate::support::server::Server;

/// Where it is shown, as ADDRESS:PORT.
fn monitor_of(server: &Server) -> String {
    let line = server.wait_for_log("the monitor runs", |line| line.json["monitor"].is_string());
    line.json["monitor"].as_str().unwrap().to_owned()
}

/// An answer by HTTP.
#[derive(Debug)]
struct Answer {
    code: u16,
    /// By their names in lower case.
    fields: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let mut lines = head.lines();
        let code = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let fields = lines.map(|line| line.split_once(": ").unwrap());
        let fields =
            fields.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
        Self { code, fields, body: body.to_owned() }
    }
}

/// A connection to the monitor.
fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(monitor_of(server)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends that, and reads until the end.
fn ask(server: &Server, request: &str) -> Answer {
    let mut stream = connect(server);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    Answer::parse(&answer)
}

/// Gets one thing, with further fields, each with its end of line.
fn get_with(server: &Server, target: &str, fields: &str) -> Answer {
    ask(
        server,
        &format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n"),
    )
}

fn get(server: &Server, target: &str) -> Answer {
    get_with(server, target, "")
}

/// What `/status.json` says.
pub(crate) fn status(server: &Server) -> Value {
    let answer = get(server, "/status.json");
    assert_eq!(answer.code, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

/// The numbers of `/metrics`, each by its name and its labels as they are written.
pub(crate) fn metrics(server: &Server) -> BTreeMap<String, f64> {
    let answer = get(server, "/metrics");
    assert_eq!(answer.code, 200, "{answer:?}");
    let numbers = answer.body.lines().filter(|line| !line.starts_with('#'));
    numbers
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}
