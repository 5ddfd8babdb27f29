//! Against what isn't a server of NBD, and servers that mean harm.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::scripted::{decent, negotiates, reply, says, serve, silence, simple};
use super::{Found, doctor, examine};

/// With little patience, for servers that take all of it.
fn quickly(target: &str) -> Found {
    let began = Instant::now();
    let found = examine(["--timeout", "1s", target]);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}: {:#}", found.report);
    found
}

#[test]
fn other_protocols_are_named() {
    const HTTP: &[u8] = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
    for (target, protocol, side) in [
        (says(b"SSH-2.0-OpenSSH_9.2p1\r\n", b""), "ssh", "client"),
        (says(b"220 mail.example.org ESMTP\r\n", b""), "mail", "client"),
        (says(b"RFB 003.008\n", b""), "vnc", "client"),
        (says(b"", HTTP), "http", "client"),
        (says(b"", b"\x15\x03\x01\0\x02\x02\x28"), "tls", "server"),
        (says(b"*** hello ***\r\n", b""), "unknown", "client"),
    ] {
        let found = quickly(&target);
        found.assert_ends("greeting", "other_protocol", side);
        assert_eq!(found.detail("greeting", "protocol"), protocol);
    }
}

/// Many HTTP servers wait for the end of a line, which a ClientHello needn't have.
#[test]
fn silent_http_servers_are_recognized() {
    let target = serve(|mut stream| {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
            request.extend(byte);
        }
        if request.starts_with(b"GET / HTTP/1.") {
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
        } else {
            silence();
        }
    });
    let found = quickly(&target);
    found.assert_ends("greeting", "other_protocol", "client");
    assert_eq!(found.detail("greeting", "protocol"), "http");
    // It doesn't wait for the whole timeout.
    let began = Instant::now();
    let found = examine(["--timeout", "300s", &target]);
    assert!(began.elapsed() < Duration::from_secs(150), "{:#}", found.report);
    assert_eq!(found.detail("greeting", "protocol"), "http");
}

/// Such a server looks at the other connections only when the first one has ended.
#[test]
fn silent_servers_with_one_client_at_a_time_are_recognized() {
    let turn = Mutex::new(());
    let target = serve(move |mut stream| {
        let _turn = turn.lock().unwrap();
        let mut request = [0; 4];
        if stream.read_exact(&mut request).is_ok() && request == *b"GET " {
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
        }
        // Until the client closes.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let found = quickly(&target);
    found.assert_ends("greeting", "other_protocol", "client");
    assert_eq!(found.detail("greeting", "protocol"), "http");
}

/// A server that is busy isn't taken for one of another protocol: here, one that serves a client
/// only after the doctor has given up its other connections.
#[test]
fn a_late_greeting_is_read() {
    let (connections, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let target = serve(move |mut stream| {
        // The first connection is greeted when the second and the third have ended. Later ones are
        // closed at once.
        match connections.fetch_add(1, Ordering::SeqCst) {
            0 => {}
            1 | 2 => {
                let _ = stream.read_to_end(&mut Vec::new());
                ended.fetch_add(1, Ordering::SeqCst);
                return;
            }
            _ => return,
        }
        while ended.load(Ordering::SeqCst) < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = stream.write_all(b"NBDMAGICIHAVEOPT\0\x03");
    });
    let found = examine(["--timeout", "60s", &target]);
    found.assert_outcome("greeting", "good");
}

#[test]
fn no_greeting_or_half_of_one() {
    quickly(&serve(|_| silence())).assert_ends("greeting", "no_greeting", "server");
    quickly(&serve(drop)).assert_ends("greeting", "closed_before_greeting", "server");
    let reset = serve(|stream| {
        let socket = socket2::SockRef::from(&stream);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        drop(stream);
    });
    // It may come as soon as the connection is there.
    let found = quickly(&reset);
    if found.has("greeting") {
        found.assert_ends("greeting", "closed_before_greeting", "server");
    } else {
        found.assert_ends("connection", "connection_reset", "server");
    }
    let half = serve(|mut stream| stream.write_all(b"NBDMAGICIHAV").unwrap());
    quickly(&half).assert_ends("greeting", "partial_greeting", "server");
    let oldstyle = says(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\x10\0\0", b"");
    quickly(&oldstyle).assert_ends("greeting", "oldstyle", "server");
    let unfixed = says(b"NBDMAGICIHAVEOPT\0\0", b"");
    quickly(&unfixed).assert_ends("greeting", "not_fixed_newstyle", "server");
}

#[test]
fn a_port_that_drops_packets() {
    // A listener whose backlog is full doesn't answer any more, as behind a firewall.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let listener: TcpListener = socket.into();
    let address = listener.local_addr().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        held.push(stream);
        assert!(held.len() < 100);
    }
    let found = quickly(&address.to_string());
    found.assert_ends("connection", "connection_timeout", "network");
}

#[test]
fn a_decent_server_of_few_words() {
    let target = negotiates(|option| decent(option, 1 << 20), |request| simple(request, 0));
    let found = quickly(&target);
    found.assert_works();
    assert_eq!(found.detail("speed", "bytes"), 1 << 20);
    assert_eq!(found.detail("replies", "structured"), false);
}

/// Many servers of before 2016 know no more than EXPORT_NAME.
#[test]
fn a_server_without_go() {
    let target = serve(|mut stream| {
        let mut serve = || -> std::io::Result<()> {
            stream.write_all(b"NBDMAGICIHAVEOPT\0\x01")?;
            stream.read_exact(&mut [0; 4])?;
            loop {
                let mut head = [0; 16];
                stream.read_exact(&mut head)?;
                let length = u32::from_be_bytes(head[12..].try_into().unwrap());
                stream.read_exact(&mut vec![0; length as usize])?;
                if head[11] == 1 {
                    break;
                }
                stream.write_all(&reply(head[11].into(), 0x8000_0001, b""))?;
            }
            stream.write_all(&8192_u64.to_be_bytes())?;
            stream.write_all(&[0, 3])?;
            stream.write_all(&[0; 124])?;
            loop {
                let mut request = [0; 28];
                stream.read_exact(&mut request)?;
                match simple(&request, 0) {
                    Some(bytes) => stream.write_all(&bytes)?,
                    None => return Ok(()),
                }
            }
        };
        let _ = serve();
    });
    let found = quickly(&target);
    found.assert_works().assert_outcome("exports", "warning");
    assert_eq!(found.detail("export", "size"), 8192);
}

#[test]
fn lists_that_do_not_end() {
    let target = negotiates(
        |option| match option {
            3 => {
                let data = [&4_u32.to_be_bytes()[..], b"disk"].concat();
                Some(reply(3, 2, &data).repeat(100_000))
            }
            _ => decent(option, 1 << 20),
        },
        |request| simple(request, 0),
    );
    let found = quickly(&target);
    // What can be examined without a list is.
    found.assert_bad("exports", "protocol_violation", "server");
    found.assert_outcome("export", "good").assert_outcome("first read", "good");
}

/// As many contexts as there may be, each as long as a reply can be.
#[test]
fn contexts_that_do_not_end() {
    let target = negotiates(
        |option| match option {
            8 => Some(reply(8, 1, b"")),
            9 => Some(reply(9, 4, &[b'x'; 60_000]).repeat(400)),
            _ => decent(option, 1 << 20),
        },
        |request| simple(request, 0),
    );
    let found = quickly(&target);
    found.assert_ends("metadata contexts", "protocol_violation", "server");
}

#[test]
fn lengths_that_cannot_be() {
    let huge_list = negotiates(
        |option| match option {
            3 => {
                let mut head = reply(3, 2, b"");
                head[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
                Some(head)
            }
            _ => decent(option, 1 << 20),
        },
        |request| simple(request, 0),
    );
    quickly(&huge_list).assert_bad("exports", "protocol_violation", "server");

    // A structured reply of 4 GiB to a read of 4 KiB.
    let huge_chunk = negotiates(
        |option| match option {
            8 => Some(reply(8, 1, b"")),
            9 => Some(reply(9, 1, b"")),
            _ => decent(option, 1 << 20),
        },
        |request| {
            let mut head = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1];
            head.extend(&request[8..16]);
            head.extend(u32::MAX.to_be_bytes());
            head.extend([0; 64]);
            Some(head)
        },
    );
    quickly(&huge_chunk).assert_ends("first read", "protocol_violation", "server");

    let no_size = negotiates(|option| decent(option, u64::MAX), |request| simple(request, 22));
    quickly(&no_size).assert_bad("export", "size_too_large", "server");
}

#[test]
fn answers_that_make_no_sense() {
    let other_cookie = negotiates(
        |option| decent(option, 1 << 20),
        |request| {
            simple(request, 0).map(|mut bytes| {
                bytes[15] ^= 1;
                bytes
            })
        },
    );
    quickly(&other_cookie).assert_ends("first read", "protocol_violation", "server");
    let garbage = says(b"NBDMAGICIHAVEOPT\0\x03", &[0xa5; 64]);
    assert_eq!(quickly(&garbage).code, Some(1));
    let hangs = negotiates(
        |option| decent(option, 1 << 20),
        |_| {
            silence();
            None
        },
    );
    quickly(&hangs).assert_ends("first read", "timeout", "server");
    let leaves = negotiates(|option| decent(option, 1 << 20), |_| None);
    quickly(&leaves).assert_ends("first read", "closed", "server");
    for (error, reason) in [(1, "read_not_allowed"), (5, "read_error"), (22, "read_rejected")] {
        let target =
            negotiates(|option| decent(option, 1 << 20), move |request| simple(request, error));
        quickly(&target).assert_bad("first read", reason, "server");
    }
}

#[test]
fn starttls_and_then_something_else() {
    let with = |then: &'static [u8], closes: bool| {
        serve(move |mut stream| {
            let mut serve = || -> std::io::Result<()> {
                stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
                stream.read_exact(&mut [0; 4])?;
                loop {
                    let mut head = [0; 16];
                    stream.read_exact(&mut head)?;
                    let option = u32::from(head[11]);
                    if option == 5 {
                        stream.write_all(&reply(5, 1, b""))?;
                        break;
                    }
                    stream.write_all(&reply(option, 0x8000_0005, b""))?;
                }
                let mut hello = [0; 4096];
                let _hello = stream.read(&mut hello)?;
                stream.write_all(then)?;
                if !closes {
                    silence();
                }
                Ok(())
            };
            let _ = serve();
        })
    };
    let garbage = quickly(&with(b"HTTP/1.1 200 OK\r\n\r\n", false));
    garbage.assert_ends("TLS", "not_tls", "server");
    quickly(&with(b"", true)).assert_ends("TLS", "closed_after_starttls", "server");
    quickly(&with(b"", false)).assert_ends("TLS", "handshake_timeout", "network");
    for (alert, reason) in [
        (40, "no_common_parameters"),
        (70, "tls_version"),
        (71, "no_common_parameters"),
        (80, "alert"),
    ] {
        let alert: &'static [u8] = vec![0x15, 3, 3, 0, 2, 2, alert].leak();
        let found = quickly(&with(alert, true));
        found.assert_ends("TLS", reason, "server");
    }
}

#[test]
fn tls_is_required_and_refused() {
    let target = negotiates(
        |option| match option {
            3 => Some(reply(3, 0x8000_0005, b"")),
            _ => decent(option, 1 << 20),
        },
        |request| simple(request, 0),
    );
    quickly(&target).assert_ends("in clear", "tls_broken", "server");
}

/// Nothing that a server sends reaches the terminal as it is.
#[test]
fn control_characters_are_escaped() {
    const EVIL: &[u8] = b"\x1b]0;title\x07\x1b[2J\r\n\xe2\x80\xae";
    let target = negotiates(
        |option| match option {
            3 => {
                let length = (EVIL.len() as u32).to_be_bytes();
                let data = [&length[..], EVIL, EVIL].concat();
                Some([reply(3, 2, &data), reply(3, 1, b"")].concat())
            }
            6 => Some(reply(6, 0x8000_0002, EVIL)),
            _ => Some(reply(option, 0x8000_0001, EVIL)),
        },
        |request| simple(request, 0),
    );
    let ended = doctor([target.clone()]);
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    let is_bad =
        |character: char| (character.is_control() && character != '\n') || character == '\u{202e}';
    assert!(!ended.stdout.contains(is_bad), "{:?}", ended.stdout);
    assert!(ended.stdout.contains("\\u{1b}]0;title"), "{}", ended.stdout);
    examine([target]).assert_ends("export", "export_not_allowed", "server");
}

#[test]
fn names_without_an_address() {
    let found = quickly("nowhere.invalid");
    found.assert_ends("name", "unresolved", "client");
}
