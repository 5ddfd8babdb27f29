//! Option replies of unbounded length, with backpressure: replies are encoded and sent while they
//! are produced, no faster than the client reads them.

use std::future::Future;
use std::io;
use std::pin::pin;

use tokio::io::AsyncWrite;
use tokio::sync::mpsc::{Sender, channel};

use super::send;
use crate::wire::option::{Opt, Rep, push_reply};

/// Capacity of the channel between producer and encoder, in items. With names and descriptions of
/// maximum length, this is 64 KiB.
const CHANNEL_CAPACITY: usize = 8;

/// Number of encoded bytes after which replies are sent.
const SEND_THRESHOLD: usize = 16 * 1024;

/// Sends a reply for each item that `produce` sends to its channel, and returns the output of
/// `produce`. The rest left in `out` is to be sent along with what follows.
///
/// `produce` is suspended while the client does not read. Memory per client is bounded by
/// [`SEND_THRESHOLD`] and [`CHANNEL_CAPACITY`], however long the list is.
pub(super) async fn stream_replies<S, T, F>(
    stream: &mut S,
    out: &mut Vec<u8>,
    (option, reply): (Opt, Rep),
    produce: impl FnOnce(Sender<T>) -> F,
    encode: impl Fn(&T) -> Vec<u8>,
) -> io::Result<F::Output>
where
    S: AsyncWrite + Unpin,
    F: Future,
{
    let (sender, mut items) = channel(CHANNEL_CAPACITY);
    let mut producing = pin!(produce(sender));
    let mut produced = None;
    loop {
        tokio::select! {
            biased;
            item = items.recv() => match item {
                Some(item) => {
                    push_reply(out, option, reply, &encode(&item));
                    if out.len() >= SEND_THRESHOLD {
                        send(stream, out).await?;
                        out.clear();
                    }
                }
                None => break,
            },
            output = &mut producing, if produced.is_none() => {
                produced = Some(output);
                // Items already in the channel can still be received.
                items.close();
            }
        }
    }
    match produced {
        Some(output) => Ok(output),
        None => Ok(producing.await),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncReadExt;

    use super::*;

    const EACH: (Opt, Rep) = (Opt::LIST, Rep::SERVER);

    #[tokio::test]
    async fn every_item_is_sent_in_order() {
        let (mut server, mut client) = tokio::io::duplex(64);
        let served = tokio::spawn(async move {
            let mut out = Vec::new();
            let produce = |items: Sender<u32>| async move {
                for number in 0..10_000 {
                    items.send(number).await.unwrap();
                }
                "done"
            };
            let encode = |number: &u32| number.to_be_bytes().to_vec();
            let output =
                stream_replies(&mut server, &mut out, EACH, produce, encode).await.unwrap();
            send(&mut server, &out).await.unwrap();
            output
        });
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(served.await.unwrap(), "done");
        let mut expected = Vec::new();
        for number in 0..10_000_u32 {
            push_reply(&mut expected, EACH.0, EACH.1, &number.to_be_bytes());
        }
        assert!(received == expected);
    }

    /// Each write costs a system call, and a record inside TLS.
    #[tokio::test]
    async fn replies_are_sent_in_batches() {
        for (count, are_sent) in [(15, false), (16, true)] {
            let (mut server, mut client) = tokio::io::duplex(1 << 20);
            let mut out = Vec::new();
            let produce = |items: Sender<()>| async move {
                for _ in 0..count {
                    items.send(()).await.unwrap();
                }
            };
            let encode = |(): &()| vec![0; 1024];
            stream_replies(&mut server, &mut out, EACH, produce, encode).await.unwrap();
            drop(server);
            let mut sent = Vec::new();
            client.read_to_end(&mut sent).await.unwrap();
            let all = count * (20 + 1024);
            assert_eq!((sent.len(), out.len()), if are_sent { (all, 0) } else { (0, all) });
        }
    }

    /// A client that does not read suspends the producer, so nothing accumulates.
    #[tokio::test]
    async fn production_pauses_while_the_client_does_not_read() {
        let made = AtomicUsize::new(0);
        let (mut server, client) = tokio::io::duplex(1);
        let mut out = Vec::new();
        let produce = |items: Sender<()>| async {
            let items = items;
            while items.send(()).await.is_ok() {
                made.fetch_add(1, Ordering::Relaxed);
            }
        };
        let encode = |(): &()| vec![0; 1024];
        {
            let mut sending = pin!(stream_replies(&mut server, &mut out, EACH, produce, encode));
            for _ in 0..1000 {
                tokio::select! {
                    biased;
                    _ = &mut sending => panic!("it has been sent"),
                    () = tokio::task::yield_now() => {}
                }
            }
        }
        assert!(made.load(Ordering::Relaxed) <= SEND_THRESHOLD / 1024 + 2 * CHANNEL_CAPACITY);
        assert!(out.capacity() <= 4 * SEND_THRESHOLD);
        drop(client);
    }

    /// The sender may outlive the future that used it.
    #[tokio::test]
    async fn streaming_ends_with_the_producer() {
        let (mut server, _client) = tokio::io::duplex(1024);
        let mut out = Vec::new();
        let mut kept = None;
        let produce = |items: Sender<u8>| {
            items.try_send(7).unwrap();
            kept = Some(items);
            std::future::ready(true)
        };
        let encode = |byte: &u8| vec![*byte];
        assert!(stream_replies(&mut server, &mut out, EACH, produce, encode).await.unwrap());
        assert_eq!(out.last(), Some(&7));
    }
}
