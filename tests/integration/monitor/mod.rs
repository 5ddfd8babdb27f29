//! What is shown of a running server (`--monitor`).

mod dashboard;
mod page;
mod top;

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::support::PATIENCE;
use crate::support::server::Server;

/// Where it is shown, as ADDRESS:PORT.
fn monitor_of(server: &Server) -> String {
    let line = server.wait_for_message("what goes on is shown by HTTP");
    line.json["monitor"].as_str().unwrap().to_owned()
}

/// What is answered to a request for that path, without the head.
fn get(monitor: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(monitor).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {monitor}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body.to_owned()
}
