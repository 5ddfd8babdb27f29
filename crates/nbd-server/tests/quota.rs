//! The quota of options that a client may send before it chooses an export.

use std::sync::Arc;

use nbd_server::wire::handshake::ClientFlags;
use nbd_server::{
    Export, Exports, ListEntry, NegotiationLimits, NegotiationQuota, PlaintextOutcome, ReadError,
    Security, Segment, SessionError, Span, negotiate, plaintext_leg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::Sender;

use super::raw::{FLAGS, OPT_GO, OPT_LIST, OPT_STARTTLS, option};

struct Nothing;

impl Export for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn size(&self) -> u64 {
        0
    }

    async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
        Ok(())
    }
}

impl Exports for Nothing {
    type Export = Self;

    async fn find(&self, _: &[u8]) -> Option<Arc<Self>> {
        Some(Arc::new(Self))
    }

    async fn list(&self, _: Sender<ListEntry>) {}
}

fn quota(options: u32, option_bytes: u64) -> NegotiationQuota {
    NegotiationLimits { options, option_bytes }.quota()
}

/// Negotiates in the plaintext phase or inside TLS. Returns the outcome, and the number of bytes
/// that the server left unread.
async fn negotiated(
    plaintext: bool,
    sent: &[u8],
    quota: &mut NegotiationQuota,
) -> (Result<bool, SessionError>, usize) {
    let (mut client, mut server) = tokio::io::duplex(1 << 20);
    client.write_all(sent).await.unwrap();
    let flags = ClientFlags(FLAGS);
    let ended = if plaintext {
        let left = plaintext_leg(&mut server, flags, quota).await;
        left.map(|outcome| outcome == PlaintextOutcome::StartTls)
    } else {
        let chosen = negotiate(&mut server, flags, Security::Tls, &Nothing, quota).await;
        chosen.map(|chosen| chosen.is_some())
    };
    drop(client);
    let mut unread = Vec::new();
    server.read_to_end(&mut unread).await.unwrap();
    (ended, unread.len())
}

#[tokio::test]
async fn options_beyond_the_quota_are_not_read() {
    let data = [7; 50];
    for (plaintext, last) in [(true, option(OPT_STARTTLS, b"")), (false, option(OPT_GO, &[0; 6]))] {
        let used = last.len() as u64 - 16;
        let three = option(99, &data).repeat(3);
        let sent = [&three[..], &last].concat();
        // All of it is just within the quota.
        let mut enough = quota(4, 150 + used);
        assert!(matches!(negotiated(plaintext, &sent, &mut enough).await, (Ok(true), 0)));
        // One option fewer: only the header of the last one is read.
        let (ended, unread) = negotiated(plaintext, &sent, &mut quota(3, 1 << 20)).await;
        assert!(matches!(ended, Err(SessionError::TooManyOptions(3))), "{ended:?}");
        assert_eq!(unread as u64, used);
        // One byte fewer: the data is neither waited for nor kept.
        let (ended, unread) = negotiated(plaintext, &three, &mut quota(9, 149)).await;
        assert!(matches!(ended, Err(SessionError::TooManyOptionBytes(149))), "{ended:?}");
        assert_eq!(unread, data.len());
    }
}

/// Otherwise, clients that start in plaintext would have twice the quota.
#[tokio::test]
async fn plaintext_and_tls_share_the_quota() {
    let mut shared = quota(5, 1000);
    let in_plaintext = [option(99, &[1; 300]), option(OPT_STARTTLS, b"")].concat();
    assert!(matches!(negotiated(true, &in_plaintext, &mut shared).await.0, Ok(true)));
    let mut other = shared.clone();
    let (ended, _) = negotiated(false, &option(OPT_LIST, b"").repeat(4), &mut shared).await;
    assert!(matches!(ended, Err(SessionError::TooManyOptions(5))), "{ended:?}");
    let (ended, _) = negotiated(false, &option(99, &[1; 701]), &mut other).await;
    assert!(matches!(ended, Err(SessionError::TooManyOptionBytes(1000))), "{ended:?}");
}
