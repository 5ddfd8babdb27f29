//! Servers that do just what a test says.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::support::client::GREETING;

/// Longer than a test lasts: a server that is silent goes on being so.
const HOUR: Duration = Duration::from_secs(3600);

/// Serves each connection by that script. The threads end with the tests.
pub(super) fn serve(script: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let script = Arc::new(script);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let script = Arc::clone(&script);
            std::thread::spawn(move || script(stream));
        }
    });
    target
}

/// Sends these bytes first, and answers whatever comes then with those.
pub(super) fn says(first: &'static [u8], then: &'static [u8]) -> String {
    serve(move |mut stream| {
        let _ = stream.write_all(first);
        let mut buffer = [0; 1024];
        while stream.read(&mut buffer).is_ok_and(|count| count > 0) {
            let _ = stream.write_all(then);
        }
    })
}

pub(super) fn silence() {
    std::thread::sleep(HOUR);
}

/// What is answered to an option; `None` ends the connection.
pub(super) type Answer = Option<Vec<u8>>;

/// A newstyle server whose options are answered so. After an answer to GO with an ACK in it,
/// requests are answered by `read`.
pub(super) fn negotiates(
    answer: impl Fn(u32) -> Answer + Send + Sync + 'static,
    read: impl Fn(&[u8; 28]) -> Answer + Send + Sync + 'static,
) -> String {
    serve(move |mut stream| {
        let _ = session(&mut stream, &answer, &read);
    })
}

fn session(
    stream: &mut TcpStream,
    answer: &impl Fn(u32) -> Answer,
    read: &impl Fn(&[u8; 28]) -> Answer,
) -> std::io::Result<()> {
    stream.write_all(GREETING)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let (option, length) = (number(8), number(12));
        stream.read_exact(&mut vec![0; length as usize])?;
        let Some(bytes) = answer(option) else { return Ok(()) };
        stream.write_all(&bytes)?;
        if option == 7 && bytes.len() > 20 {
            break;
        }
    }
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        let Some(bytes) = read(&request) else { return Ok(()) };
        stream.write_all(&bytes)?;
    }
}

/// One reply to an option.
pub(super) fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for field in [option, kind, data.len() as u32] {
        out.extend(field.to_be_bytes());
    }
    out.extend(data);
    out
}

/// A decent server: no TLS, simple replies, a list of one and an export of so many bytes.
pub(super) fn decent(option: u32, size: u64) -> Answer {
    let unsupported = reply(option, 0x8000_0001, b"");
    Some(match option {
        3 => {
            let data = [&4_u32.to_be_bytes()[..], b"disk"].concat();
            [reply(option, 2, &data), reply(option, 1, b"")].concat()
        }
        6 | 7 => {
            let info = [&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat();
            [reply(option, 3, &info), reply(option, 1, b"")].concat()
        }
        _ => unsupported,
    })
}

/// A simple reply with data, or with an error and without.
pub(super) fn simple(request: &[u8; 28], error: u32) -> Answer {
    if request[7] == 2 {
        return None;
    }
    let mut out = 0x6744_6698_u32.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(&request[8..16]);
    if error == 0 {
        let length = u32::from_be_bytes(request[24..28].try_into().unwrap());
        out.extend(vec![0; length as usize]);
    }
    Some(out)
}
