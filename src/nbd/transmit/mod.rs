//! The transmission phase ("Transmission"): many requests at once, answered in whatever
//! order they are ready.
//!
//! Two futures share the connection's one task. One takes requests in ([`inbox`]), has
//! each judged ([`verdict`]), and answers at once what needs no waiting; the rest goes
//! to tasks of its own. The other sends replies ([`outbox`]): all that are ready, then
//! one flush. Requests that arrived together are therefore answered together.

mod chunks;
mod inbox;
mod outbox;
mod ticket;
mod verdict;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::budget::{Budget, Share};
use super::error::Refusal;
use super::wire::reply::ErrorCode;
use super::{Chosen, Export, ReadError, ReplyMode, Segment, SessionError, Span};
use inbox::Inbox;
use outbox::Outbox;
use ticket::{Reply, Ticket};
use verdict::{Session, Verdict, judge};

/// Requests of one connection that are worked on, or answered but not yet sent. The
/// Linux client keeps 128 in flight, others fewer.
const MAX_REQUESTS_IN_FLIGHT: usize = 256;

/// What one connection may use.
#[derive(Debug, Clone)]
pub struct TransmitLimits {
    /// Memory for replies, shared with all other connections.
    pub budget: Arc<Budget>,
    /// How long a client that is in the way of others may read nothing.
    pub stall: Duration,
    /// How long a client that has left may take to read its last replies.
    pub drain: Duration,
}

/// How transmission ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// The client said `NBD_CMD_DISC`.
    Disconnected,
    /// The client closed the stream between two requests.
    HungUp,
    /// The server is shutting down.
    ShutDown,
}

/// What happened during transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// How it ended.
    pub farewell: Farewell,
    /// Requests that came.
    pub requests: u64,
    /// How much they asked to read, in bytes.
    pub bytes: u64,
}

/// Serves what was chosen until the client leaves or `shutdown` completes.
///
/// Every request that was received is answered, and the answers are sent, before this
/// returns; then the stream is shut down (TLS with it).
///
/// # Errors
/// The stream failed, or the client broke the protocol or its limits.
pub async fn transmit<S, E>(
    stream: S,
    chosen: Chosen<E>,
    limits: &TransmitLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<Summary, SessionError>
where
    S: AsyncRead + AsyncWrite,
    E: Export,
{
    let (reader, writer) = tokio::io::split(stream);
    let share = Arc::new(Share::new(Arc::clone(&limits.budget)));
    let (replies, ready) = mpsc::unbounded_channel();

    let mut send = pin!(Outbox::new(writer, ready, Arc::clone(&share), limits.stall).run());
    let mut receive = pin!(receive(Inbox::new(reader), replies, chosen, share, shutdown));

    tokio::select! {
        received = &mut receive => {
            // The last reply's sender goes with the last answer; then `send` ends.
            let drained = tokio::time::timeout(limits.drain, send).await;
            let summary = received?;
            drained.map_err(|_| SessionError::DrainTimeout)??;
            Ok(summary)
        }
        // While requests are received, sending ends only by failing.
        sent = &mut send => {
            sent?;
            Ok(receive.await?)
        }
    }
}

/// Takes requests in until there will be no more.
async fn receive<R, E>(
    mut inbox: Inbox<R>,
    replies: mpsc::UnboundedSender<Reply>,
    chosen: Chosen<E>,
    share: Arc<Share>,
    shutdown: impl Future<Output = ()>,
) -> Result<Summary, SessionError>
where
    R: AsyncRead + Unpin,
    E: Export,
{
    let Chosen { export, replies: mode } = chosen;
    let session = Session { size: export.size(), structured: mode == ReplyMode::Structured };
    let slots = Arc::new(Semaphore::new(MAX_REQUESTS_IN_FLIGHT));
    // Reads that have to wait. They end with the connection.
    let mut misses = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let (mut requests, mut bytes) = (0, 0);

    let farewell = loop {
        let request = tokio::select! {
            biased;
            () = &mut shutdown => break Farewell::ShutDown,
            request = inbox.request() => match request? {
                Some(request) => request,
                None => break Farewell::HungUp,
            },
        };
        requests += 1;

        // Nobody closes the semaphore, so a slot always comes.
        let slot = Arc::clone(&slots).acquire_owned().await.ok();
        let ticket = Ticket::new(request.cookie, mode, replies.clone(), slot);

        match judge(&request, session) {
            Verdict::Read { span, whole } => {
                bytes += u64::from(span.length);
                let ticket = ticket.holding(share.take(span.length).await);
                match export.read_now(span) {
                    Some(segments) => answer(span, whole, Ok(segments), ticket),
                    None => {
                        while misses.try_join_next().is_some() {}
                        misses.spawn(read_later(Arc::clone(&export), span, whole, ticket));
                    }
                }
            }
            Verdict::Done => ticket.done(),
            Verdict::Refuse { refusal, payload } => {
                // The payload of a refused WRITE is on its way all the same.
                inbox.skip(payload).await?;
                ticket.refuse(&refusal);
            }
            Verdict::Disconnect => {
                ticket.withdraw();
                break Farewell::Disconnected;
            }
            Verdict::TooLarge(length) => {
                ticket.withdraw();
                return Err(SessionError::PayloadTooLarge(length));
            }
        }
    };
    while misses.join_next().await.is_some() {}
    Ok(Summary { farewell, requests, bytes })
}

async fn read_later<E: Export>(export: Arc<E>, span: Span, whole: bool, ticket: Ticket) {
    let result = export.read(span).await;
    answer(span, whole, result, ticket);
}

/// Answers a read, and guards the stream's step: an answer that isn't exactly as long as
/// the question would shift everything behind it.
fn answer(span: Span, whole: bool, result: Result<Vec<Segment>, ReadError>, ticket: Ticket) {
    const WRONG_LENGTH: Refusal =
        Refusal::new(ErrorCode::IO, "the export returned another number of bytes than asked for");
    match result {
        Ok(segments) => {
            let length: usize = segments.iter().map(Segment::len).sum();
            if length == span.length as usize {
                ticket.data(span, whole, segments);
            } else {
                ticket.refuse(&WRONG_LENGTH);
            }
        }
        Err(error) => ticket.refuse(&error.into()),
    }
}
