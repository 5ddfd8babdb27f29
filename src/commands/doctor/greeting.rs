//! Reads the first bytes of a connection, and identifies the protocol that they belong to.

use std::io;
use std::time::Duration;

use nbd_server::wire::handshake::{Greeting, IHAVEOPT, NBDMAGIC};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::connect::{Address, BoxedStream};
use super::probe_error::ProbeError;
use super::tls;

/// Second magic number of an oldstyle server. That dialect was replaced in 2011.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Time to wait for more bytes if the first ones aren't NBD, to identify the protocol.
const EXTRA_WAIT: Duration = Duration::from_millis(300);
/// Time in which a server may answer a request of another protocol.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Request that every HTTP server answers, if only with an error.
const HTTP_REQUEST: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

/// Protocol of a server that doesn't speak NBD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ForeignProtocol {
    Ssh,
    Http,
    Tls,
    Mail,
    Vnc,
    Unknown(Vec<u8>),
}

/// Classification of the first bytes of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerGreeting {
    Newstyle(Greeting),
    Oldstyle,
    /// An incomplete NBD greeting of this many bytes.
    Partial(usize),
    Foreign(ForeignProtocol),
    /// No bytes before the connection was closed.
    Closed,
    /// No bytes within the timeout, and no answer that identifies another protocol.
    Silence,
}

/// Reads and classifies the first bytes.
pub(super) async fn read(
    stream: &mut BoxedStream,
    timeout: Duration,
) -> Result<ServerGreeting, ProbeError> {
    let mut bytes = Vec::new();
    let mut is_closed = false;
    let whole = async {
        while bytes.len() < Greeting::SIZE && may_be_nbd(&bytes) {
            let mut buffer = [0; Greeting::SIZE];
            let room = buffer.get_mut(..Greeting::SIZE - bytes.len()).unwrap_or_default();
            match stream.read(room).await {
                Ok(0) => {
                    is_closed = true;
                    break;
                }
                Ok(count) => bytes.extend(buffer.get(..count).unwrap_or_default()),
                Err(error) if bytes.is_empty() => match ProbeError::from_io(&error) {
                    ProbeError::Closed => {
                        is_closed = true;
                        break;
                    }
                    other => return Err(other),
                },
                Err(_) => break,
            }
        }
        Ok(())
    };
    // On a timeout, classify the bytes that have arrived.
    if let Ok(Err(failure)) = tokio::time::timeout(timeout, whole).await {
        return Err(failure);
    }
    if bytes.is_empty() && is_closed {
        return Ok(ServerGreeting::Closed);
    }
    if bytes.is_empty() {
        return Ok(ServerGreeting::Silence);
    }
    if !may_be_nbd(&bytes) {
        read_more(stream, &mut bytes, EXTRA_WAIT).await;
    }
    Ok(classify(&bytes))
}

/// Identifies a server that sends nothing before its client does, as an HTTP or TLS server. Opens
/// connections of its own.
///
/// A TLS server answers a ClientHello; to an HTTP request, it may answer in HTTP that it speaks TLS.
/// Some HTTP servers answer a ClientHello, and all of them a request.
pub(super) async fn identify_silent_server(address: &Address) -> Option<ForeignProtocol> {
    for request in [tls::client_hello()?, HTTP_REQUEST.to_vec()] {
        let answered = tokio::time::timeout(PROBE_TIMEOUT, first_answer(address, &request)).await;
        // An unknown answer to a request of another protocol identifies nothing.
        if let Ok(Ok(bytes)) = answered
            && let ServerGreeting::Foreign(protocol) = classify(&bytes)
            && !matches!(protocol, ForeignProtocol::Unknown(_))
        {
            return Some(protocol);
        }
    }
    None
}

/// Returns the first bytes that a server sends after a request.
async fn first_answer(address: &Address, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = address.connect().await?;
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut bytes = vec![0; 64];
    let count = stream.read(&mut bytes).await?;
    bytes.truncate(count);
    Ok(bytes)
}

async fn read_more(stream: &mut BoxedStream, bytes: &mut Vec<u8>, timeout: Duration) {
    let mut buffer = [0; 64];
    if let Ok(Ok(count)) = tokio::time::timeout(timeout, stream.read(&mut buffer)).await {
        bytes.extend(buffer.get(..count).unwrap_or_default());
    }
}

fn may_be_nbd(bytes: &[u8]) -> bool {
    let magic = NBDMAGIC.to_be_bytes();
    bytes.iter().zip(&magic).all(|(got, expected)| got == expected)
}

/// Classifies the bytes by the protocol that starts with them.
fn classify(bytes: &[u8]) -> ServerGreeting {
    if bytes.is_empty() {
        return ServerGreeting::Closed;
    }
    if let Ok(greeting) = bytes.try_into()
        && let Ok(greeting) = Greeting::decode(greeting)
    {
        return ServerGreeting::Newstyle(greeting);
    }
    if let Some(behind) = bytes.strip_prefix(&NBDMAGIC.to_be_bytes()) {
        let begins = |magic: u64| {
            let magic = magic.to_be_bytes();
            behind.iter().zip(&magic).all(|(got, expected)| got == expected)
        };
        if behind.len() >= 8 && begins(OLDSTYLE_MAGIC) {
            return ServerGreeting::Oldstyle;
        }
        if begins(IHAVEOPT) || begins(OLDSTYLE_MAGIC) {
            return ServerGreeting::Partial(bytes.len());
        }
    } else if may_be_nbd(bytes) {
        return ServerGreeting::Partial(bytes.len());
    }
    ServerGreeting::Foreign(match bytes {
        [b'S', b'S', b'H', b'-', ..] => ForeignProtocol::Ssh,
        [b'H', b'T', b'T', b'P', ..] => ForeignProtocol::Http,
        // An alert or handshake record, with a version between SSL 3.0 and TLS 1.3.
        [0x15 | 0x16, 3, 0..=4, ..] => ForeignProtocol::Tls,
        [b'2', b'2', b'0', b' ' | b'-', ..]
        | [b'*', b' ', b'O', b'K', ..]
        | [b'+', b'O', b'K', ..] => ForeignProtocol::Mail,
        [b'R', b'F', b'B', b' ', ..] => ForeignProtocol::Vnc,
        _ => ForeignProtocol::Unknown(bytes.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::wire::handshake::HandshakeFlags;

    #[test]
    fn first_bytes_identify_the_protocol() {
        let flags = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        assert_eq!(
            classify(b"NBDMAGICIHAVEOPT\0\x03"),
            ServerGreeting::Newstyle(Greeting { flags })
        );
        assert_eq!(classify(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"), ServerGreeting::Oldstyle);
        for partial in [&b"N"[..], b"NBDMAGIC", b"NBDMAGICIHAVE", b"NBDMAGICIHAVEOPT\0"] {
            assert_eq!(classify(partial), ServerGreeting::Partial(partial.len()));
        }
        for (bytes, protocol) in [
            (&b"SSH-2.0-OpenSSH_9.2"[..], ForeignProtocol::Ssh),
            (b"HTTP/1.1 400 Bad Request", ForeignProtocol::Http),
            (b"\x15\x03\x01\0\x02\x02\x28", ForeignProtocol::Tls),
            (b"\x16\x03\x03", ForeignProtocol::Tls),
            (b"220 mail.example.org ESMTP", ForeignProtocol::Mail),
            (b"RFB 003.008\n", ForeignProtocol::Vnc),
            (b"hello", ForeignProtocol::Unknown(b"hello".to_vec())),
            (
                b"NBDMAGICIHAVENOT\0\x03",
                ForeignProtocol::Unknown(b"NBDMAGICIHAVENOT\0\x03".to_vec()),
            ),
        ] {
            assert_eq!(classify(bytes), ServerGreeting::Foreign(protocol), "{bytes:?}");
        }
    }
}
