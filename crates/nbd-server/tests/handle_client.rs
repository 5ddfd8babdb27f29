//! Whole sessions through `handle_client`, with ready-made exports and the crate's own client.

use std::future::pending;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::client::{self, ClientError};
use nbd_server::wire::option::Rep;
use nbd_server::wire::reply::ErrorCode;
use nbd_server::{
    AccessFilter, BytesExport, CloseReason, ExportCatalog, ExportSet, Exports, FileExport,
    NegotiationLimits, ReplyMode, SessionError, SessionOptions, SessionStats, handle_client,
    handle_client_with,
};
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

type Outcome = Result<Option<SessionStats>, SessionError>;

fn content(length: usize) -> Bytes {
    (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<u8>>().into()
}

fn serve<X: Exports + 'static>(exports: X) -> (DuplexStream, JoinHandle<Outcome>) {
    let (client, server) = tokio::io::duplex(64 * 1024);
    (client, tokio::spawn(async move { handle_client(server, &exports).await }))
}

#[tokio::test]
async fn bytes_are_served_in_every_reply_mode() {
    let bytes = content(5 * 1024 * 1024 + 17);
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let (mut stream, server) =
            serve(ExportSet::single(BytesExport::new("disk", bytes.clone())));
        client::greet(&mut stream).await.unwrap();
        match mode {
            ReplyMode::Simple => {}
            ReplyMode::Structured => {
                client::negotiate_structured_replies(&mut stream).await.unwrap();
            }
            ReplyMode::Extended => client::negotiate_extended_headers(&mut stream).await.unwrap(),
        }
        let mut session = client::go_with_mode(stream, "disk", mode).await.unwrap();
        assert_eq!(session.export().size, bytes.len() as u64);
        let ranges = [(0, bytes.len()), (1, 1), (4095, 20_000), (bytes.len() - 1, 1)];
        for (offset, length) in ranges {
            let read = session.read(offset as u64, u32::try_from(length).unwrap()).await.unwrap();
            assert!(read == bytes[offset..offset + length], "{mode:?} {offset} {length}");
        }
        let beyond = session.read(bytes.len() as u64, 1).await.unwrap_err();
        assert!(matches!(
            beyond,
            ClientError::Failed(ErrorCode::INVAL)
                | ClientError::FailedWithMessage { error: ErrorCode::INVAL, .. }
        ));
        session.disconnect_and_wait().await.unwrap();
        let stats = server.await.unwrap().unwrap().unwrap();
        let read: usize = ranges.iter().map(|(_, length)| length).sum();
        assert_eq!((stats.close_reason, stats.requests), (CloseReason::Disconnected, 5));
        assert_eq!((stats.bytes, stats.unanswered), (read as u64, 0));
    }
}

#[tokio::test]
async fn exports_are_listed_and_chosen_by_name() {
    let set = || ExportSet::new(["a", "b"].map(|name| BytesExport::new(name, name.as_bytes())));
    let (mut stream, server) = serve(set());
    client::greet(&mut stream).await.unwrap();
    let entries = client::list(&mut stream).await.unwrap();
    assert_eq!(entries, ["a", "b"].map(|name| (name.to_owned(), String::new())));
    assert_eq!(client::info(&mut stream, "").await.unwrap().name.as_deref(), Some("a"));
    let unknown = client::info(&mut stream, "c").await.unwrap_err();
    assert!(matches!(unknown, ClientError::Refused { reply: Rep::ERR_UNKNOWN, .. }));
    let mut session = client::go(stream, "b").await.unwrap();
    assert_eq!(session.read(0, 1).await.unwrap(), b"b");
    session.disconnect_and_wait().await.unwrap();
    assert!(server.await.unwrap().unwrap().is_some());

    // A client that only lists is served as well, and leaves no statistics.
    let (mut stream, server) = serve(set());
    client::greet(&mut stream).await.unwrap();
    client::abort(&mut stream).await.unwrap();
    drop(stream);
    assert!(server.await.unwrap().unwrap().is_none());
}

#[tokio::test]
async fn a_view_hides_forbidden_exports() {
    let set = Arc::new(ExportSet::new(["a", "b"].map(|name| BytesExport::new(name, name))));
    assert_eq!(set.summaries().len(), 2);
    let (mut stream, _server) = serve(set.view_for(AccessFilter::new(|name| name == "b")));
    client::greet(&mut stream).await.unwrap();
    assert_eq!(client::list(&mut stream).await.unwrap(), [("b".to_owned(), String::new())]);
    for name in ["a", ""] {
        let hidden = client::info(&mut stream, name).await.unwrap_err();
        assert!(matches!(hidden, ClientError::Refused { reply: Rep::ERR_UNKNOWN, .. }), "{name}");
    }
    assert_eq!(client::info(&mut stream, "b").await.unwrap().size, 1);
}

#[tokio::test]
async fn files_are_served_and_a_truncated_one_is_an_io_error() {
    let path = std::env::temp_dir().join(format!("nbd-server-file-{}", std::process::id()));
    let bytes = content(300_000);
    std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
    let (mut stream, server) = serve(ExportSet::single(FileExport::open("disk", &path).unwrap()));
    client::greet(&mut stream).await.unwrap();
    let mut session = client::go(stream, "").await.unwrap();
    assert!(session.read(0, 300_000).await.unwrap() == bytes);
    assert!(session.read(299_999, 1).await.unwrap() == bytes[299_999..]);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    assert!(session.read(0, 1000).await.unwrap() == bytes[..1000]);
    let gone = session.read(500, 1000).await.unwrap_err();
    assert!(matches!(gone, ClientError::Failed(ErrorCode::IO)), "{gone}");
    std::fs::remove_file(&path).unwrap();
    assert!(FileExport::open("disk", &path).is_err());
    session.disconnect().await.unwrap();
    server.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn negotiation_has_a_deadline() {
    let (mut stream, server) = serve(ExportSet::single(BytesExport::new("disk", "x")));
    client::greet(&mut stream).await.unwrap();
    let outcome = server.await.unwrap();
    assert!(matches!(outcome, Err(SessionError::NegotiationTimeout)), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn options_are_in_force() {
    let exports = ExportSet::single(BytesExport::new("disk", "x"));
    let options = SessionOptions {
        negotiation: NegotiationLimits { options: 2, ..NegotiationLimits::default() },
        idle_timeout: Some(Duration::from_secs(5)),
        ..SessionOptions::new(Budget::new(0, 0))
    };
    let serve = || {
        let (client, server) = tokio::io::duplex(1024);
        let (exports, options) = (exports.clone(), options.clone());
        let serving =
            async move { handle_client_with(server, &exports, &options, pending()).await };
        (client, tokio::spawn(serving))
    };
    let (mut stream, server) = serve();
    client::greet(&mut stream).await.unwrap();
    for _ in 0..2 {
        client::info(&mut stream, "").await.unwrap();
    }
    assert!(client::info(&mut stream, "").await.is_err());
    assert!(matches!(server.await.unwrap(), Err(SessionError::TooManyOptions(2))));

    let (mut stream, server) = serve();
    client::greet(&mut stream).await.unwrap();
    let _session = client::go(stream, "").await.unwrap();
    let stats = server.await.unwrap().unwrap().unwrap();
    assert_eq!(stats.close_reason, CloseReason::IdleTimeout);
}

#[tokio::test]
async fn shutdown_ends_sessions_in_either_phase() {
    for has_chosen in [false, true] {
        let exports = ExportSet::single(BytesExport::new("disk", "x"));
        let (mut stream, server) = tokio::io::duplex(1024);
        let (shutdown, told) = oneshot::channel();
        let session = tokio::spawn(async move {
            let stopped = async { told.await.unwrap_or_default() };
            handle_client_with(server, &exports, &SessionOptions::default(), stopped).await
        });
        client::greet(&mut stream).await.unwrap();
        if has_chosen {
            let mut reading = client::go(&mut stream, "").await.unwrap();
            assert_eq!(reading.read(0, 1).await.unwrap(), b"x");
        }
        shutdown.send(()).unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        drop(stream);
        let reason = session.await.unwrap().unwrap().map(|stats| stats.close_reason);
        assert_eq!(reason, has_chosen.then_some(CloseReason::ShutDown));
    }
}
