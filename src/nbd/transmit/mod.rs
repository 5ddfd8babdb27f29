//! The transmission phase ("Transmission"): many requests at once, answered in whatever
//! order they are ready.
//!
//! A connection is one task. It takes requests in ([`inbox`]), has each judged
//! ([`verdict`]), and writes the answers to those that need no waiting into a queue
//! ([`answer`], [`outgoing`]); the rest goes to tasks of its own ([`work`]), whose answers
//! come back by a channel. What a client that reads in order will ask for next is read
//! ahead ([`sequence`]). When nothing more has arrived, or enough waits, it sends the
//! queue ([`outbox`]): what arrived together is answered together.

mod answer;
mod assembly;
mod batch;
mod chunks;
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
use super::error::Refusal;
use super::wire::MAX_PAYLOAD;
use super::wire::request::Request;
use super::{Activity, Chosen, Export, Segment, SelectedContext, SessionError, Span, Throttle};
use answer::Answer;
use batch::Batch;
use held::Held;
use inbox::Inbox;
use outbox::Outbox;
use outgoing::Outgoing;
use sequence::{Outlook, Sequence};
use ticket::Ticket;
use verdict::{BAD_STATUS_PAYLOAD, Session, Verdict, judge, status_range};
use work::{Job, PIECE, StatusQuery, WRONG_PARTS, Worker, status_payload};

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
    let mut connection = Connection::new(stream, chosen, limits);
    let mut served = connection.serve(pin!(shutdown)).await;
    connection.note();
    if let Ok(Farewell::ShutDown) = served
        && let Err(error) = connection.refuse_the_rest().await
    {
        served = Err(error);
    }
    // What was asked before the client broke the protocol, or off, is answered all the same.
    // If the stream has failed, this ends at once.
    let drained = match served {
        Err(SessionError::Stalled) => Ok(()),
        _ => connection.drain(limits.drain).await,
    };
    connection.note();
    let farewell = served?;
    drained?;
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
        Summary { farewell, requests: self.requests, bytes: self.bytes }
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

    /// Takes a request in, or holds it back until the throttle lets it pass.
    fn arrived(&mut self, request: Request) -> Result<Option<Farewell>, SessionError> {
        let Some(throttle) = &self.throttle else { return self.take_in(&request) };
        let bytes = match judge(&request, self.session) {
            // Nobody is kept from leaving.
            Verdict::Disconnect | Verdict::TooLarge(_) => return self.take_in(&request),
            Verdict::Read { span, .. } => span.length,
            // It is read all the same, if not sent. Nobody caches more than the longest read.
            Verdict::Cache { length, .. } => {
                u32::try_from(length).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD)
            }
            _ => 0,
        };
        if throttle.pass_now(bytes) {
            return self.take_in(&request);
        }
        self.held = Some(Held::new(request, bytes, throttle, self.batch.arrived));
        Ok(None)
    }

    /// Answers a request, or has it answered. Says so if it is the last one.
    fn take_in(&mut self, request: &Request) -> Result<Option<Farewell>, SessionError> {
        let verdict = judge(request, self.session);
        match verdict {
            Verdict::Disconnect => return Ok(Some(Farewell::Disconnected)),
            Verdict::TooLarge(length) => return Err(SessionError::PayloadTooLarge(length)),
            _ => self.count(request),
        }
        let answer = Answer::to(request, self.session.mode);
        match verdict {
            Verdict::Read { span, whole } => {
                self.bytes += u64::from(span.length);
                self.read(answer, span, whole);
                self.look_ahead(span);
            }
            Verdict::Cache { offset, length } => self.spawn(answer, Job::Cache { offset, length }),
            Verdict::Status { offset, length, one } => {
                let contexts = self.contexts.clone();
                self.spawn(answer, Job::Status(StatusQuery { offset, length, one, contexts }));
            }
            Verdict::StatusOf { offset, payload, one } => {
                let payload = self.inbox.payload(payload);
                let asked = payload.and_then(|payload| status_payload(&payload, &self.contexts));
                match asked {
                    None => self.refuse(answer, &BAD_STATUS_PAYLOAD),
                    Some((length, contexts)) => {
                        match status_range(offset, length, self.session.size) {
                            Err(refusal) => self.refuse(answer, &refusal),
                            Ok(()) => {
                                let query = StatusQuery { offset, length, one, contexts };
                                self.spawn(answer, Job::Status(query));
                            }
                        }
                    }
                }
            }
            Verdict::Done => self.answer(|out| answer.done(out)),
            Verdict::Refuse { refusal, payload } => {
                // The payload of a refused WRITE is on its way all the same.
                self.inbox.skip(payload);
                self.refuse(answer, &refusal);
            }
            Verdict::Disconnect | Verdict::TooLarge(_) => {}
        }
        Ok(None)
    }

    fn count(&mut self, request: &Request) {
        self.requests += 1;
        self.batch.count(request);
    }

    /// Answers a read at once if its data and the memory for it are at hand.
    fn read(&mut self, answer: Answer, span: Span, whole: bool) {
        let job = Job::Read { span, whole };
        if span.length == 0 {
            self.batch.answered(0);
            return self.answer(|out| answer.done(out));
        }
        if span.length > PIECE {
            return self.spawn(answer, job);
        }
        let Some(hold) = self.share.take_now(span.length) else { return self.spawn(answer, job) };
        self.segments.clear();
        if !self.export.read_now(span, &mut self.segments) {
            drop(hold);
            return self.spawn(answer, job);
        }
        if self.segments.iter().map(Segment::len).sum::<usize>() != span.length as usize {
            self.batch.answered(0);
            return self.refuse(answer, &WRONG_PARTS);
        }
        self.batch.answered(span.length);
        let queue = &mut self.outbox.queue;
        answer.data(queue, span, whole, true, &mut self.segments);
        queue.push_receipt(Some(hold), true);
    }

    /// Reads ahead of a client that reads in order, and stops when it doesn't any more.
    fn look_ahead(&mut self, span: Span) {
        match self.sequence.note(span, self.session.size) {
            Outlook::Unchanged => {}
            Outlook::Elsewhere => {
                if let Some(ahead) = self.ahead.take() {
                    ahead.abort();
                }
            }
            // One thing at a time: a client that is ahead of it doesn't need it.
            Outlook::Ahead(_) if self.ahead.as_ref().is_some_and(|last| !last.is_finished()) => {}
            Outlook::Ahead(span) => {
                let export = Arc::clone(&self.export);
                self.ahead = Some(self.run(async move { export.read_ahead(span).await }));
            }
        }
    }

    /// Has a request answered by a task of its own.
    fn spawn(&mut self, answer: Answer, job: Job) {
        let span = match job {
            Job::Read { span, .. } => Some(span),
            Job::Cache { .. } | Job::Status(_) => None,
        };
        let ticket = Ticket::new(answer, self.replies.clone(), self.batch.later(span));
        self.run(Arc::clone(&self.worker).work(ticket, job));
    }

    /// Runs a task beside this one, and forgets those that have ended: some clients never
    /// cause any but to read ahead, and read for days.
    fn run(&mut self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(work)
    }

    fn answer(&mut self, write: impl FnOnce(&mut Outgoing)) {
        write(&mut self.outbox.queue);
        self.outbox.queue.push_receipt(None, true);
    }

    fn refuse(&mut self, answer: Answer, refusal: &Refusal) {
        self.batch.activity.add_error(refusal.code);
        self.answer(|out| answer.refuse(out, refusal));
    }
}

/// The end of that time; if there is none, it never comes.
async fn elapsed(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::{ReadError, ReplyMode};

    struct Zeros;

    impl Export for Zeros {
        fn name(&self) -> &'static str {
            "zeros"
        }

        fn description(&self) -> &'static str {
            ""
        }

        fn size(&self) -> u64 {
            1 << 40
        }

        fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
            segments.push(Segment::Zeros(span.length));
            true
        }

        async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
            Ok(())
        }
    }

    /// Tasks that had read ahead were kept until a read had to wait, which may never be.
    #[tokio::test]
    async fn reading_ahead_leaves_nothing_behind() {
        let (_client, server) = tokio::io::duplex(1);
        let replies = ReplyMode::Structured;
        let chosen = Chosen { export: Arc::new(Zeros), replies, contexts: Vec::new() };
        let limits = TransmitLimits::new(Budget::new(0, 0));
        let mut connection = Connection::new(server, chosen, &limits);
        let mut begun = 0;
        for number in 0..10_000 {
            connection.look_ahead(Span { offset: number * 65_536, length: 65_536 });
            begun += u32::from(connection.ahead.as_ref().is_some_and(|last| !last.is_finished()));
            tokio::task::yield_now().await;
        }
        assert!(begun > 100, "{begun}");
        assert!(connection.tasks.len() <= 2, "{}", connection.tasks.len());
    }
}
