//! The transmission phase ("Transmission"): many requests at once, answered in whatever
//! order they are ready.
//!
//! Two futures share the connection's one task. One takes requests in ([`inbox`]), has
//! each judged ([`verdict`]), and answers at once what needs no waiting; the rest goes
//! to tasks of its own. The other sends replies ([`outbox`]): all that are ready, then
//! one flush. Requests that arrived together are therefore answered together.

mod inbox;
mod outbox;
mod verdict;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::budget::{Budget, Share};
use super::wire::reply::ErrorCode;
use super::{Export, ReadError, Segment, SessionError, Span};
use inbox::Inbox;
use outbox::{Outbox, Ticket};
use verdict::{Verdict, judge};

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
}

/// Serves `export` until the client leaves or `shutdown` completes.
///
/// Every request that was received is answered, and the answers are sent, before this
/// returns; then the stream is shut down (TLS with it).
///
/// # Errors
/// The stream failed, or the client broke the protocol or its limits.
pub async fn transmit<S, E>(
    stream: S,
    export: Arc<E>,
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
    let mut receive = pin!(receive(Inbox::new(reader), replies, export, share, shutdown));

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
    replies: mpsc::UnboundedSender<outbox::Reply>,
    export: Arc<E>,
    share: Arc<Share>,
    shutdown: impl Future<Output = ()>,
) -> Result<Summary, SessionError>
where
    R: AsyncRead + Unpin,
    E: Export,
{
    let slots = Arc::new(Semaphore::new(MAX_REQUESTS_IN_FLIGHT));
    // Reads that have to wait. They end with the connection.
    let mut misses = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let mut requests = 0;

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
        let ticket = Ticket::new(request.cookie, replies.clone(), slot);

        match judge(&request, export.size()) {
            Verdict::Read(span) => {
                let hold = share.take(span.length).await;
                let ticket = ticket.holding(hold);
                match export.read_now(span) {
                    Some(segments) => ticket.data(exactly(span, Ok(segments))),
                    None => {
                        while misses.try_join_next().is_some() {}
                        misses.spawn(read_later(Arc::clone(&export), span, ticket));
                    }
                }
            }
            Verdict::Done => ticket.data(Ok(Vec::new())),
            Verdict::Refuse { error, payload } => {
                // The payload of a refused WRITE is on its way all the same.
                inbox.skip(payload).await?;
                ticket.error(error);
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
    Ok(Summary { farewell, requests })
}

async fn read_later<E: Export>(export: Arc<E>, span: Span, ticket: Ticket) {
    let result = export.read(span).await;
    ticket.data(exactly(span, result));
}

/// Guards the stream's step: an answer that isn't exactly as long as the question would
/// shift everything behind it.
fn exactly(span: Span, result: Result<Vec<Segment>, ReadError>) -> Result<Vec<Segment>, ErrorCode> {
    let segments = result.map_err(ReadError::code)?;
    let length: usize = segments.iter().map(Segment::len).sum();
    if length == span.length as usize { Ok(segments) } else { Err(ErrorCode::IO) }
}
