//! Reads the first bytes of a connection, and identifies the protocol that they belong to.

use std::time::Duration;

use nbd_server::wire::handshake::{Greeting, IHAVEOPT, NBDMAGIC};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::reach::Stream;
use super::tls;
use super::trouble::Trouble;

/// Second magic number of an oldstyle server. That dialect was replaced in 2011.
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Time to wait for more bytes if the first ones aren't NBD, to identify the protocol.
const A_LITTLE: Duration = Duration::from_millis(300);
/// Time in which a silent server may answer a TLS ClientHello.
const PROBE: Duration = Duration::from_secs(3);

/// Protocol of a server that doesn't speak NBD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Protocol {
    Ssh,
    Http,
    Tls,
    Mail,
    Vnc,
    Unknown(Vec<u8>),
}

/// Classification of the first bytes of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    Newstyle(Greeting),
    Oldstyle,
    /// An incomplete NBD greeting of this many bytes.
    Partial(usize),
    Foreign(Protocol),
    /// No bytes before the connection was closed.
    Closed,
    /// No bytes within the timeout.
    Silence,
}

/// Reads and classifies the first bytes.
pub(super) async fn read(stream: &mut Stream, timeout: Duration) -> Result<Seen, Trouble> {
    let mut bytes = Vec::new();
    let mut is_closed = false;
    let whole = async {
        while bytes.len() < Greeting::SIZE && is_like_nbd(&bytes) {
            let mut buffer = [0; Greeting::SIZE];
            let room = buffer.get_mut(..Greeting::SIZE - bytes.len()).unwrap_or_default();
            match stream.read(room).await {
                Ok(0) => {
                    is_closed = true;
                    break;
                }
                Ok(count) => bytes.extend(buffer.get(..count).unwrap_or_default()),
                Err(error) if bytes.is_empty() => match Trouble::of_io(&error) {
                    Trouble::Closed => {
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
    if let Ok(Err(trouble)) = tokio::time::timeout(timeout, whole).await {
        return Err(trouble);
    }
    if bytes.is_empty() && is_closed {
        return Ok(Seen::Closed);
    }
    if bytes.is_empty() {
        return Ok(provoked(stream, timeout.min(PROBE)).await);
    }
    if !is_like_nbd(&bytes) {
        more(stream, &mut bytes, A_LITTLE).await;
    }
    Ok(judge(&bytes))
}

/// Sends a TLS ClientHello to a silent server and classifies the answer. Servers of other protocols
/// may wait for the client to speak first; an HTTP server answers a ClientHello, too.
async fn provoked(stream: &mut Stream, timeout: Duration) -> Seen {
    let Some(hello) = tls::hello() else { return Seen::Silence };
    if stream.write_all(&hello).await.is_err() || stream.flush().await.is_err() {
        return Seen::Silence;
    }
    let mut bytes = Vec::new();
    more(stream, &mut bytes, timeout).await;
    match judge(&bytes) {
        // An unknown answer to a ClientHello identifies nothing.
        Seen::Foreign(Protocol::Unknown(_)) | Seen::Closed | Seen::Partial(_) => Seen::Silence,
        seen => seen,
    }
}

async fn more(stream: &mut Stream, bytes: &mut Vec<u8>, timeout: Duration) {
    let mut buffer = [0; 64];
    if let Ok(Ok(count)) = tokio::time::timeout(timeout, stream.read(&mut buffer)).await {
        bytes.extend(buffer.get(..count).unwrap_or_default());
    }
}

fn is_like_nbd(bytes: &[u8]) -> bool {
    let magic = NBDMAGIC.to_be_bytes();
    bytes.iter().zip(&magic).all(|(got, expected)| got == expected)
}

/// Classifies the bytes by the protocol that starts with them.
fn judge(bytes: &[u8]) -> Seen {
    if bytes.is_empty() {
        return Seen::Closed;
    }
    if let Ok(greeting) = bytes.try_into()
        && let Ok(greeting) = Greeting::decode(greeting)
    {
        return Seen::Newstyle(greeting);
    }
    if let Some(behind) = bytes.strip_prefix(&NBDMAGIC.to_be_bytes()) {
        let begins = |magic: u64| {
            let magic = magic.to_be_bytes();
            behind.iter().zip(&magic).all(|(got, expected)| got == expected)
        };
        if behind.len() >= 8 && begins(OLDSTYLE) {
            return Seen::Oldstyle;
        }
        if begins(IHAVEOPT) || begins(OLDSTYLE) {
            return Seen::Partial(bytes.len());
        }
    } else if is_like_nbd(bytes) {
        return Seen::Partial(bytes.len());
    }
    Seen::Foreign(match bytes {
        [b'S', b'S', b'H', b'-', ..] => Protocol::Ssh,
        [b'H', b'T', b'T', b'P', ..] => Protocol::Http,
        // An alert or handshake record, with a version between SSL 3.0 and TLS 1.3.
        [0x15 | 0x16, 3, 0..=4, ..] => Protocol::Tls,
        [b'2', b'2', b'0', b' ' | b'-', ..]
        | [b'*', b' ', b'O', b'K', ..]
        | [b'+', b'O', b'K', ..] => Protocol::Mail,
        [b'R', b'F', b'B', b' ', ..] => Protocol::Vnc,
        _ => Protocol::Unknown(bytes.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::wire::handshake::HandshakeFlags;

    #[test]
    fn first_bytes_are_known() {
        let flags = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        assert_eq!(judge(b"NBDMAGICIHAVEOPT\0\x03"), Seen::Newstyle(Greeting { flags }));
        assert_eq!(judge(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"), Seen::Oldstyle);
        for partial in [&b"N"[..], b"NBDMAGIC", b"NBDMAGICIHAVE", b"NBDMAGICIHAVEOPT\0"] {
            assert_eq!(judge(partial), Seen::Partial(partial.len()));
        }
        for (bytes, protocol) in [
            (&b"SSH-2.0-OpenSSH_9.2"[..], Protocol::Ssh),
            (b"HTTP/1.1 400 Bad Request", Protocol::Http),
            (b"\x15\x03\x01\0\x02\x02\x28", Protocol::Tls),
            (b"\x16\x03\x03", Protocol::Tls),
            (b"220 mail.example.org ESMTP", Protocol::Mail),
            (b"RFB 003.008\n", Protocol::Vnc),
            (b"hello", Protocol::Unknown(b"hello".to_vec())),
            (b"NBDMAGICIHAVENOT\0\x03", Protocol::Unknown(b"NBDMAGICIHAVENOT\0\x03".to_vec())),
        ] {
            assert_eq!(judge(bytes), Seen::Foreign(protocol), "{bytes:?}");
        }
    }
}
