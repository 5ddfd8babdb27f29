//! The transmission phase ("Transmission"): many requests at once, answered in whatever
//! order they are ready.
//!
//! Two futures share the connection's one task. One takes requests in ([`inbox`]), has
//! each judged ([`verdict`]), and answers at once what needs no waiting; the rest goes
//! to tasks of its own. The other sends replies ([`outbox`]): all that are ready, then
//! one flush. Requests that arrived together are therefore answered together.

mod assembly;
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

use super::budget::{Budget, RESERVE, Share};
use super::error::Refusal;
use super::wire::MAX_PAYLOAD;
use super::wire::reply::{ErrorCode, Extent, MAX_EXTENTS};
use super::{Chosen, Export, Segment, SelectedContext, SessionError, Span};
use inbox::Inbox;
use outbox::Outbox;
use ticket::{ReadAnswer, Reply, Ticket, WRONG_PARTS};
use verdict::{BAD_STATUS_PAYLOAD, Session, Verdict, judge, status_range};

/// Requests of one connection that are worked on, or answered but not yet sent. The
/// Linux client keeps 128 in flight, others fewer.
const MAX_REQUESTS_IN_FLIGHT: usize = 256;

/// Reads of one connection that are worked on at once. The others wait, so that a flood of
/// them doesn't stand in front of every other client's.
const MAX_READS_AT_ONCE: usize = 8;

/// How long a client may take to close once the server is shutting down.
const SHUTDOWN_LINGER: Duration = Duration::from_secs(1);

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
    let mut receive = pin!(receive(
        Inbox::new(reader, chosen.replies),
        replies,
        chosen,
        Arc::clone(&share),
        shutdown
    ));

    let received = tokio::select! {
        received = &mut receive => received,
        // While requests are received, sending ends only by failing.
        sent = &mut send => {
            sent?;
            return Ok(receive.await?.0);
        }
    };
    // The last reply's sender goes with the last answer; then `send` ends.
    drain(&mut send, &share, limits.drain).await?;
    let (summary, mut inbox) = received?;
    let linger = match summary.farewell {
        Farewell::HungUp => Duration::ZERO,
        Farewell::Disconnected => limits.drain,
        Farewell::ShutDown => SHUTDOWN_LINGER.min(limits.drain),
    };
    // A client that doesn't close in time is closed upon, which is no failure.
    tokio::time::timeout(linger, inbox.discard()).await.unwrap_or_default();
    Ok(summary)
}

/// Waits until the last replies are sent, for as long as the client takes them.
async fn drain(
    mut send: impl Future<Output = Result<(), SessionError>> + Unpin,
    share: &Share,
    patience: Duration,
) -> Result<(), SessionError> {
    loop {
        let before = share.sent();
        match tokio::time::timeout(patience, &mut send).await {
            Ok(sent) => return sent,
            Err(_) if share.sent() > before => {}
            Err(_) => return Err(SessionError::DrainTimeout),
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
) -> Result<(Summary, Inbox<R>), SessionError>
where
    R: AsyncRead + Unpin,
    E: Export,
{
    let Chosen { export, replies: mode, contexts } = chosen;
    let session = Session { size: export.size(), mode, contexts: !contexts.is_empty() };
    let slots = Arc::new(Semaphore::new(MAX_REQUESTS_IN_FLIGHT));
    let turns = Arc::new(Semaphore::new(MAX_READS_AT_ONCE));
    // What has to wait. It ends with the connection.
    let mut tasks = JoinSet::new();
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
        let ticket = Ticket::new(&request, mode, replies.clone(), slot);
        while tasks.try_join_next().is_some() {}

        match judge(&request, session) {
            Verdict::Read { span, whole } => {
                bytes += u64::from(span.length);
                let ticket = ticket.holding(share.take(span.length).await);
                match export.read_now(span) {
                    Some(segments) => read_at_once(ticket, span, whole, segments),
                    None => {
                        let work = read(Arc::clone(&export), ticket, span, whole);
                        tasks.spawn(in_turn(Arc::clone(&turns), work));
                    }
                }
            }
            Verdict::Cache { offset, length } => {
                let work = cache(Arc::clone(&export), ticket, offset, length);
                tasks.spawn(in_turn(Arc::clone(&turns), work));
            }
            Verdict::Status { offset, length, one } => {
                let query = StatusQuery { offset, length, one, contexts: contexts.clone() };
                let (hold, memory) = share.take_up_to(query.memory(), ENOUGH_FOR_STATUS).await;
                let work = status(Arc::clone(&export), ticket.holding(hold), query, memory);
                tasks.spawn(in_turn(Arc::clone(&turns), work));
            }
            Verdict::StatusOf { offset, payload, one } => {
                let asked = status_payload(&mut inbox, payload, &contexts).await?;
                let Some((length, contexts)) = asked else {
                    ticket.refuse(&BAD_STATUS_PAYLOAD);
                    continue;
                };
                if let Err(refusal) = status_range(offset, length, session.size) {
                    ticket.refuse(&refusal);
                    continue;
                }
                let query = StatusQuery { offset, length, one, contexts };
                let (hold, memory) = share.take_up_to(query.memory(), ENOUGH_FOR_STATUS).await;
                let work = status(Arc::clone(&export), ticket.holding(hold), query, memory);
                tasks.spawn(in_turn(Arc::clone(&turns), work));
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
    if farewell == Farewell::ShutDown {
        refuse_the_rest(&mut inbox, session, &replies, &slots).await?;
    }
    while tasks.join_next().await.is_some() {}
    Ok((Summary { farewell, requests, bytes }, inbox))
}

/// Answers requests that have arrived and won't be worked on: "The error value issued in
/// respect of these requests … SHOULD be NBD_ESHUTDOWN."
async fn refuse_the_rest<R: AsyncRead + Unpin>(
    inbox: &mut Inbox<R>,
    session: Session,
    replies: &mpsc::UnboundedSender<Reply>,
    slots: &Arc<Semaphore>,
) -> Result<(), SessionError> {
    const SHUTTING_DOWN: Refusal = Refusal::new(ErrorCode::SHUTDOWN, "the server is shutting down");
    // More than clients have under way; one that goes on asking must not go on for ever.
    const MOST: usize = 4 * MAX_REQUESTS_IN_FLIGHT;
    for _ in 0..MOST {
        let Some(request) = inbox.request_now().await? else { break };
        let slot = Arc::clone(slots).acquire_owned().await.ok();
        let ticket = Ticket::new(&request, session.mode, replies.clone(), slot);
        let payload = match judge(&request, session) {
            Verdict::Disconnect | Verdict::TooLarge(_) => {
                ticket.withdraw();
                break;
            }
            Verdict::StatusOf { payload, .. } | Verdict::Refuse { payload, .. } => payload,
            _ => 0,
        };
        // A payload may never come whole, and nothing can be read behind it until it has.
        let skipped = tokio::time::timeout(SHUTDOWN_LINGER, inbox.skip(payload)).await;
        ticket.refuse(&SHUTTING_DOWN);
        match skipped {
            Ok(skipped) => skipped?,
            Err(_) => break,
        }
    }
    Ok(())
}

/// Answers a read with what is at hand.
fn read_at_once(ticket: Ticket, span: Span, whole: bool, segments: Vec<Segment>) {
    let length: usize = segments.iter().map(Segment::len).sum();
    if length == span.length as usize {
        ticket.data(span, whole, segments);
    } else {
        ticket.refuse(&WRONG_PARTS);
    }
}

/// Does `work` when it is this request's turn.
async fn in_turn(turns: Arc<Semaphore>, work: impl Future<Output = ()>) {
    // Nobody closes the semaphore, so the turn always comes.
    let _turn = turns.acquire().await.ok();
    work.await;
}

async fn read<E: Export>(export: Arc<E>, ticket: Ticket, span: Span, whole: bool) {
    let mut answer = ReadAnswer::new(ticket, span, whole);
    let result = export.read(span, |offset, segment| answer.part(offset, segment)).await;
    answer.finish(result);
}

async fn cache<E: Export>(export: Arc<E>, ticket: Ticket, offset: u64, length: u64) {
    match export.cache(offset, length).await {
        Ok(()) => ticket.done(),
        Err(error) => ticket.refuse(&error.into()),
    }
}

/// A block status request that makes sense.
struct StatusQuery {
    offset: u64,
    length: u64,
    /// Whether no more than one extent is wanted of each context.
    one: bool,
    contexts: Vec<SelectedContext>,
}

/// What an extent may take of memory, in bytes.
const EXTENT: usize = size_of::<Extent>();

/// Memory with which a block status request can always be answered, if not at length.
const ENOUGH_FOR_STATUS: u32 = RESERVE / 4;

impl StatusQuery {
    /// What a full answer may take of memory, in bytes: extents are sectors at the least,
    /// but for the first and the last.
    fn memory(&self) -> u32 {
        const SECTOR: u64 = 512;
        let sectors = usize::try_from(self.length / SECTOR + 2).unwrap_or(usize::MAX);
        let each = if self.one { 1 } else { sectors.min(MAX_EXTENTS / self.contexts.len().max(1)) };
        let bytes = each * self.contexts.len() * EXTENT;
        u32::try_from(bytes).unwrap_or(u32::MAX).min(MAX_PAYLOAD)
    }

    /// How many extents each context may have in that much memory.
    fn most(&self, memory: u32) -> usize {
        if self.one { 1 } else { (memory as usize / EXTENT / self.contexts.len().max(1)).max(1) }
    }
}

async fn status<E: Export>(export: Arc<E>, ticket: Ticket, query: StatusQuery, memory: u32) {
    /// An answer without extents would leave a client where it was.
    const NO_EXTENTS: Refusal =
        Refusal::new(ErrorCode::IO, "the export knows nothing of that range");
    let mut answers = Vec::with_capacity(query.contexts.len());
    for context in &query.contexts {
        let StatusQuery { offset, length, .. } = query;
        match export.extents(context.position, offset, length, query.most(memory)).await {
            Ok(extents) if extents.is_empty() => return ticket.refuse(&NO_EXTENTS),
            Ok(extents) => answers.push((context.id, extents)),
            Err(error) => return ticket.refuse(&error.into()),
        }
    }
    ticket.status(&answers);
}

/// Reads the payload of a block status request: "64 bits, effect length; n * 32 bits, list
/// of metacontext ids to use". `None` for one that makes no sense, which has been skipped.
async fn status_payload<R: AsyncRead + Unpin>(
    inbox: &mut Inbox<R>,
    payload: u32,
    selected: &[SelectedContext],
) -> Result<Option<(u64, Vec<SelectedContext>)>, SessionError> {
    const LENGTH: usize = 8;
    const ID: usize = 4;
    // "detects duplicate or unknown metacontext ids": more than all can't be right.
    if payload as usize > LENGTH + ID * selected.len() {
        inbox.skip(payload).await?;
        return Ok(None);
    }
    let payload = inbox.payload(payload).await?;
    let Some((length, ids)) = payload.split_first_chunk::<LENGTH>() else { return Ok(None) };
    let (ids, []) = ids.as_chunks::<ID>() else { return Ok(None) };
    let mut contexts: Vec<SelectedContext> = Vec::with_capacity(ids.len());
    for id in ids {
        let id = u32::from_be_bytes(*id);
        match selected.iter().find(|context| context.id == id) {
            Some(context) if !contexts.contains(context) => contexts.push(*context),
            _ => return Ok(None),
        }
    }
    let length = u64::from_be_bytes(*length);
    Ok((!contexts.is_empty()).then_some((length, contexts)))
}
