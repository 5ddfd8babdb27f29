//! The transmission phase ("Transmission"): many requests at once, answered in whatever
//! order they are ready.
//!
//! A connection is one task. It takes requests in ([`inbox`]), has each judged
//! ([`verdict`]), and writes the answers to those that need no waiting into a queue
//! ([`dispatch`], [`answer`], [`outgoing`]); the rest goes to tasks of its own ([`work`]), whose answers
//! come back by a channel. What a client that reads in order will ask for next is read
//! ahead ([`sequence`]). When nothing more has arrived, or enough waits, it sends the
//! queue ([`outbox`]): what arrived together is answered together.

mod answer;
mod assembly;
mod batch;
mod chunks;
mod dispatch;
mod ending;
mod held;
mod inbox;
mod outbox;
mod outgoing;
mod pace;
mod sequence;
mod ticket;
mod verdict;
mod work;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::budget::{Budget, Share};
use super::{Activity, Chosen, Export, Segment, SelectedContext, SessionError, Throttle};
use batch::Batch;
use held::Held;
use inbox::Inbox;
use outbox::Outbox;
use outgoing::Outgoing;
use sequence::Sequence;
use verdict::Session;
use work::{StatusQuery, Worker};

/// Requests of one connection that are worked on, or answered but not yet sent. The
/// Linux client keeps 128 in flight, others fewer.
const MAX_REQUESTS_IN_FLIGHT: u64 = 256;

/// How long a client may take to close that didn't ask for the end.
const LINGER: Duration = Duration::from_secs(1);

/// What one connection may use.
#[derive(Debug, Clone)]
pub struct TransmitLimits {
    /// Memory for replies, shared with all other connections.
    pub budget: Arc<Budget>,
    /// How fast its client may ask, shared with that client's other connections. While a
    /// request waits for it, nothing more is read from the stream.
    pub throttle: Option<Arc<Throttle>>,
    /// How long a client may ask for nothing while nothing is owed to it.
    pub idle: Option<Duration>,
    /// How long a client that is in the way of others may read nothing.
    pub stall: Duration,
    /// How long a client that has left may take to read its last replies.
    pub drain: Duration,
    /// Where it is noted what the session does. It should be this connection's alone.
    pub activity: Arc<Activity>,
}

impl TransmitLimits {
    /// A share of `budget`, and ten seconds to read; nothing else is limited.
    pub fn new(budget: Arc<Budget>) -> Self {
        const PATIENCE: Duration = Duration::from_secs(10);
        let activity = Arc::default();
        Self { budget, throttle: None, idle: None, stall: PATIENCE, drain: PATIENCE, activity }
    }
}

/// How transmission ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// The client said `NBD_CMD_DISC`.
    Disconnected,
    /// The client closed the stream between two requests.
    HungUp,
    /// The client asked for nothing for too long.
    Idle,
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
    /// Requests among them whose answers could not be sent to the last byte, since the stream
    /// failed, or the client stopped reading, while the server was shutting down.
    pub unanswered: u64,
}

/// Serves what was chosen until the client leaves or `shutdown` completes.
///
/// Every request that was accepted is answered, and the answers are sent, before the stream is
/// shut down (TLS with it) and this returns. A request is accepted once it has been read from the
/// stream, payload included, and the throttle has let it pass.
///
/// When `shutdown` completes, nothing more is read from the stream, and it ends between two
/// replies. Requests that were not accepted get no reply, not even `NBD_ESHUTDOWN`: a client that
/// reconnects repeats them, while an error would go to whoever reads the disk.
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
    let mut connection = Connection::new(stream, chosen, limits);
    let mut served = connection.serve(pin!(shutdown)).await;
    let is_shutdown = matches!(served, Ok(Farewell::ShutDown));
    if is_shutdown {
        served = connection.serve_accepted(limits.drain).await;
    }
    connection.note();
    // What was asked before the client broke the protocol, or off, is answered all the same.
    // If the stream has failed, this ends at once.
    let drained = match served {
        Err(SessionError::Stalled) => Ok(()),
        _ => connection.drain(limits.drain).await,
    };
    connection.note();
    let ended = served.and_then(|farewell| drained.map(|()| farewell));
    let farewell = match ended {
        // The server ended the session, and the client left or stopped reading meanwhile.
        Err(SessionError::Io(_) | SessionError::Stalled | SessionError::DrainTimeout)
            if is_shutdown =>
        {
            return Ok(connection.summary(Farewell::ShutDown));
        }
        ended => ended?,
    };
    let linger = match farewell {
        Farewell::HungUp => Duration::ZERO,
        Farewell::Disconnected => limits.drain,
        Farewell::Idle | Farewell::ShutDown => LINGER.min(limits.drain),
    };
    // A client that doesn't close in time is closed upon, which is no failure.
    tokio::time::timeout(linger, connection.inbox.discard()).await.unwrap_or_default();
    Ok(connection.summary(farewell))
}

/// One client's connection.
struct Connection<S, E> {
    export: Arc<E>,
    session: Session,
    contexts: Vec<SelectedContext>,
    inbox: Inbox<ReadHalf<S>>,
    outbox: Outbox<WriteHalf<S>>,
    share: Arc<Share>,
    worker: Arc<Worker<E>>,
    /// What has to wait. It ends with the connection.
    tasks: JoinSet<()>,
    sequence: Sequence,
    /// What is being read ahead.
    ahead: Option<AbortHandle>,
    /// By which answers of `tasks` come back.
    replies: mpsc::UnboundedSender<Outgoing>,
    ready: mpsc::UnboundedReceiver<Outgoing>,
    /// Requests that came, and how much they asked to read, in bytes.
    requests: u64,
    bytes: u64,
    /// What a read at once found; kept so that none of them has to allocate.
    segments: Vec<Segment>,
    throttle: Option<Arc<Throttle>>,
    /// A request that waits for the throttle.
    held: Option<Held>,
    idle: Option<Duration>,
    batch: Batch,
}

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    fn new(stream: S, chosen: Chosen<E>, limits: &TransmitLimits) -> Self {
        let Chosen { export, replies: mode, contexts } = chosen;
        let (reader, writer) = tokio::io::split(stream);
        let share = Arc::new(Share::new(Arc::clone(&limits.budget)));
        let (replies, ready) = mpsc::unbounded_channel();
        let session = Session { size: export.size(), mode, contexts: !contexts.is_empty() };
        Self {
            inbox: Inbox::new(reader, mode, StatusQuery::longest_payload(&contexts)),
            outbox: Outbox::new(writer, Arc::clone(&share), limits.stall),
            worker: Arc::new(Worker::new(Arc::clone(&export), Arc::clone(&share))),
            tasks: JoinSet::new(),
            sequence: Sequence::default(),
            ahead: None,
            export,
            session,
            contexts,
            share,
            replies,
            ready,
            requests: 0,
            bytes: 0,
            segments: Vec::new(),
            throttle: limits.throttle.clone(),
            held: None,
            idle: limits.idle,
            batch: Batch::new(Arc::clone(&limits.activity)),
        }
    }

    fn summary(&self, farewell: Farewell) -> Summary {
        let unanswered = self.in_flight();
        Summary { farewell, requests: self.requests, bytes: self.bytes, unanswered }
    }

    /// Takes requests in and answers them until there will be no more.
    async fn serve(
        &mut self,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Farewell, SessionError> {
        loop {
            self.batch.activity.set_in_flight(self.in_flight());
            let may_ask = self.may_ask();
            let is_idle = self.is_idle();
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(Farewell::ShutDown),
                request = self.inbox.request(), if may_ask => {
                    let Some(request) = request? else { return Ok(Farewell::HungUp) };
                    self.batch.arrived = Instant::now();
                    if let Some(farewell) = self.arrived(request)? {
                        return Ok(farewell);
                    }
                    // What arrived together with it, without asking the system again.
                    while self.may_ask() && let Some(request) = self.inbox.request_here()? {
                        if let Some(farewell) = self.arrived(request)? {
                            return Ok(farewell);
                        }
                    }
                    self.note();
                }
                (request, arrived) = held::next(&mut self.held), if self.held.is_some() => {
                    self.batch.arrived = arrived;
                    self.batch.activity.add_held(arrived.elapsed());
                    if let Some(farewell) = self.take_in(&request)? {
                        return Ok(farewell);
                    }
                    self.note();
                }
                Some(reply) = self.ready.recv() => self.outbox.queue.append(reply),
                sent = self.outbox.send(), if !self.outbox.is_empty() => sent?,
                () = elapsed(self.idle), if is_idle => return Ok(Farewell::Idle),
            }
        }
    }

    /// Whether a further request may be taken in.
    fn may_ask(&self) -> bool {
        self.in_flight() < MAX_REQUESTS_IN_FLIGHT && self.outbox.has_room() && self.held.is_none()
    }

    /// Whether nothing can happen unless the client asks for something, and there is a limit
    /// to that. The time until then begins anew whenever this becomes true; a part of a
    /// request changes nothing.
    fn is_idle(&self) -> bool {
        self.idle.is_some()
            && self.in_flight() == 0
            && self.outbox.is_empty()
            && self.held.is_none()
    }

    /// Notes what was done since the last time, for whoever watches.
    fn note(&mut self) {
        self.batch.note();
        self.batch.activity.set_in_flight(self.in_flight());
    }

    /// Requests that are not answered to the last byte yet.
    fn in_flight(&self) -> u64 {
        self.requests - self.outbox.answered()
    }
}

/// The end of that time; if there is none, it never comes.
async fn elapsed(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}
