//! The life of one connection: handshake, TLS, choice of an export, transmission, and the log line
//! at its end.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;

use rustls::ProtocolVersion;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use tracing::field::display;

use super::access::{AccessRequest, Reason, Timestamp};
use super::live::Live;
use super::policy::{Dismissal, Numbered};
use super::slots::{Full, Place};
use super::story::{self, Protection, Story};
use super::tls::{
    self, Credentials, CredentialsError, EncryptedStream, HandshakeFailure, RecordCountingStream,
};
use super::watched::{Denials, Watched};
use super::{Shared, tell};
use nbd_server::wire::Printable;
use nbd_server::wire::handshake::ClientFlags;
use nbd_server::{
    AccessFilter, CloseReason, Export, ExportCatalog, Negotiated, NegotiationQuota,
    PlaintextOutcome, Security, SessionError, SessionStats, TransmitLimits, greet, negotiate,
    plaintext_leg, transmit,
};
use nbd_telemetry::escape;

/// Outcome of a connection that didn't fail.
pub(super) enum Ending {
    /// The client left before it chose an export, as `nbdinfo --list` does.
    LeftEarly,
    /// The client chose an export, and transmission ended normally.
    Served(SessionStats),
}

/// Reason for closing an admitted connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the TLS handshake failed: {0}")]
    TlsHandshake(#[from] HandshakeFailure),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("{who} may not come in: {why}")]
    NotAllowed { who: String, why: Reason },
    #[error("it may not stay: {0}")]
    Dismissed(#[from] Dismissal),
    #[error(
        "its TLS keys are used up: with TLS 1.2 and AES-GCM they may protect 2^24 records and can't \
         be replaced; it can connect again, and isn't limited with ChaCha20-Poly1305 or TLS 1.3"
    )]
    TlsKeyLimit,
    #[error("its handshake panicked; this is a fault of this program")]
    Panicked,
    #[error("{0} took longer than allowed")]
    Deadline(&'static str),
    #[error("{0}")]
    Full(#[from] Full),
    #[error("this server is shutting down")]
    ShuttingDown,
    #[error("it was still busy at the shutdown deadline (--shutdown-timeout)")]
    ShutdownDeadline,
}

/// A connection whose address was admitted.
pub(super) struct Connection<'a, X> {
    pub(super) shared: &'a Arc<Shared<X>>,
    pub(super) live: &'a Arc<Live>,
    pub(super) slot: Place,
    /// Time at which the connection was accepted; the handshake timeout counts from it.
    pub(super) started: Instant,
    pub(super) shutdown: &'a CancellationToken,
}

/// State of a client at the beginning of its negotiation.
struct Negotiation {
    flags: ClientFlags,
    security: Security,
    quota: NegotiationQuota,
}

/// An authenticated client, or one without a certificate.
struct Client {
    credentials: Option<Arc<Credentials>>,
    protection: Protection,
    /// Cancelled when the stream's TLS keys are nearly used up.
    keys_exhausted: CancellationToken,
}

impl<X: ExportCatalog> Connection<'_, X> {
    /// Serves the client until the connection ends, then audits, counts and logs the outcome.
    pub(super) async fn serve<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (shared, live, started) = (self.shared, self.live, self.started);
        let story = Story::new(&shared.config.audit, live, started);
        let ended = tokio::select! {
            biased;
            why = live.dismissed() => Err(why.into()),
            () = shared.deadline.cancelled() => Err(Failure::at_the_deadline(live)),
            ended = self.talk(stream) => ended,
        };
        story.end(&ended);
        let duration = started.elapsed();
        match ended {
            Ok(Ending::LeftEarly) => tracing::debug!(?duration, "left without choosing an export"),
            Ok(Ending::Served(SessionStats { close_reason, requests, bytes, unanswered })) => {
                tell(&shared.chatter.sessions, |held_back| {
                    let how = story::how(close_reason);
                    let sentence = match close_reason {
                        CloseReason::ShutDown => "closed for shutdown",
                        CloseReason::IdleTimeout => {
                            "closed: it asked for nothing for too long (--idle-timeout)"
                        }
                        CloseReason::Disconnected | CloseReason::StreamClosed => "left",
                    };
                    let unanswered = Some(unanswered).filter(|count| *count > 0);
                    tracing::info!(
                        how,
                        requests,
                        bytes,
                        unanswered,
                        ?duration,
                        held_back,
                        "{sentence}"
                    );
                });
            }
            // The client hadn't chosen an export, so the shutdown interrupted nothing.
            Err(Failure::ShuttingDown) if live.export().is_none() => {
                tracing::debug!(?duration, "closed for shutdown");
            }
            Err(failure @ (Failure::ShuttingDown | Failure::ShutdownDeadline)) => {
                tell(&shared.chatter.sessions, |held_back| {
                    let how = failure.label();
                    let sentence = match failure {
                        Failure::ShutdownDeadline => {
                            "closed for shutdown: it was still busy (--shutdown-timeout)"
                        }
                        _ => "closed for shutdown",
                    };
                    let done = live.activity.totals();
                    let (requests, bytes) = (done.requests.total(), done.bytes);
                    let unanswered = Some(live.activity.in_flight()).filter(|count| *count > 0);
                    tracing::info!(
                        how,
                        requests,
                        bytes,
                        unanswered,
                        ?duration,
                        held_back,
                        "{sentence}"
                    );
                });
            }
            // A health check often closes the connection as soon as it is established.
            Err(Failure::Session(SessionError::Io(failure))) if live.route.is_own => {
                tracing::debug!("the load balancer's own connection failed: {failure}");
            }
            Err(failure) => {
                shared.failures.count(failure.label());
                if let Failure::TlsHandshake(failure) = &failure {
                    shared.handshake_failures.count(failure.cause.label());
                }
                let reason = failure.label();
                tell(&shared.chatter.failures, |held_back| {
                    tracing::warn!(
                        reason,
                        ?duration,
                        held_back,
                        "closed: {}",
                        escape::text(&failure.to_string())
                    );
                });
            }
        }
    }

    /// Runs all phases: greeting, TLS if the policy requires it, authorization, negotiation,
    /// transmission.
    async fn talk<S>(self, mut stream: S) -> Result<Ending, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let timeouts = &self.shared.config.timeouts;
        let handshake = Phase {
            name: "the NBD handshake",
            ends: self.started + timeouts.handshake,
            shutdown: self.shutdown,
        };
        let flags = handshake.run(greet(&mut stream)).await??;
        let mut quota = self.shared.config.limits.negotiation.quota();
        // Doesn't hold the policy itself, which would stay in memory for the whole session.
        let (in_clear, number) = self.shared.policy.look(|it| (it.policy.tls.is_none(), it.number));
        if in_clear {
            let client = self.meet(None, Protection { version: "none", cipher: None }, number)?;
            let negotiation = Negotiation { flags, security: Security::Plain, quota };
            let (stream, chosen) = self.negotiate(stream, &client, negotiation, &handshake).await?;
            return self.transmission(stream, chosen, client).await;
        }

        match handshake.run(plaintext_leg(&mut stream, flags, &mut quota)).await?? {
            PlaintextOutcome::ClientLeft => return Ok(Ending::LeftEarly),
            PlaintextOutcome::StartTls => {}
        }
        let ends = handshake.ends.min(Instant::now() + timeouts.tls_handshake);
        let tls_handshake = Phase { ends, ..handshake };
        let (stream, client) = self.tls(stream, &tls_handshake).await?;
        let negotiation = Negotiation { flags, security: Security::Tls, quota };
        let (stream, chosen) = self.negotiate(stream, &client, negotiation, &handshake).await?;
        self.transmission(stream, chosen, client).await
    }

    /// Negotiates an export on the handshake threads. Options may cost more than reads, and
    /// established readers must not wait for clients that may never be authorized.
    async fn negotiate<S>(
        &self,
        mut stream: S,
        client: &Client,
        negotiation: Negotiation,
        phase: &Phase<'_>,
    ) -> Result<(S, Option<Negotiated<X::Export>>), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let seen = self.seen_by(client);
        let Negotiation { flags, security, mut quota } = negotiation;
        let negotiating = async move {
            let chosen = negotiate(&mut stream, flags, security, &seen, &mut quota).await;
            chosen.map(|chosen| (stream, chosen))
        };
        let negotiated = phase.run(self.shared.porch.run(negotiating)).await?;
        Ok(negotiated.ok_or(Failure::Panicked)??)
    }

    /// Performs the TLS handshake and authenticates the client.
    async fn tls<S>(
        &self,
        stream: S,
        phase: &Phase<'_>,
    ) -> Result<(TlsStream<RecordCountingStream<S>>, Client), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let in_force = self.shared.policy.now();
        // A reload can't switch TLS on or off, so this isn't reached without TLS.
        let Some(tls) = &in_force.policy.tls else { return Err(Failure::ShuttingDown) };
        let tls = tls.clone();
        let handshake = async move { tls::handshake(stream, &tls).await };
        let EncryptedStream { stream, keys_exhausted } =
            match phase.run(self.shared.porch.run(handshake)).await {
                Err(Failure::Deadline(_)) => return Err(HandshakeFailure::timed_out().into()),
                shaken => shaken?.ok_or(Failure::Panicked)??,
            };
        let (_, session) = stream.get_ref();
        let version = match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
            Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
            _ => "TLS",
        };
        let cipher = session.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        let protection = Protection { version, cipher };
        let credentials = match session.peer_certificates() {
            Some(chain) => Some(Arc::new(Credentials::from_chain(chain, Timestamp::now())?)),
            None => None,
        };
        let client = self.meet(credentials, protection, in_force.number)?;
        Ok((stream, Client { keys_exhausted, ..client }))
    }

    /// Authorizes the client now that its identity is known.
    ///
    /// `verified_by` is the number of the policy that verified the credentials. Another one may be
    /// active by now, so they are reviewed against the current policy.
    fn meet(
        &self,
        credentials: Option<Arc<Credentials>>,
        protection: Protection,
        verified_by: u64,
    ) -> Result<Client, Failure> {
        self.live.identify(credentials.clone(), verified_by, protection.tls());
        let in_force = self.shared.policy.now();
        let client = Client { credentials, protection, keys_exhausted: CancellationToken::new() };
        if let Some(identity) = client.identity() {
            Span::current().record("identity", display(identity));
        }
        let facts = AccessRequest::from_peer(self.live.route.peer).with_identity(client.identity());
        if let Err(why) = in_force.policy.rules.evaluate(&facts) {
            return Err(Failure::NotAllowed { who: client.to_string(), why });
        }
        self.live.review(&in_force, Timestamp::now())?;
        if client.credentials.is_some() {
            tracing::debug!("it is {client}");
        }
        Ok(client)
    }

    /// Returns the client's view of the exports. Each lookup is checked against the rules active at
    /// that time.
    fn seen_by(&self, client: &Client) -> Watched<X> {
        let (shared, peer) = (Arc::clone(self.shared), self.live.route.peer);
        let credentials = client.credentials.clone();
        let audit = shared.config.audit.clone();
        let denials = Denials::default();
        let noted = audit.is_enabled().then(|| denials.clone());
        let may_open = AccessFilter::new(move |export| {
            let identity = credentials.as_deref().map(Credentials::identity);
            let facts = AccessRequest::from_peer(peer).with_identity(identity).with_export(export);
            let judged = shared.policy.judge(&facts);
            if let (Err(why), Some(noted)) = (&judged, &noted) {
                noted.note(export, why.clone());
            }
            judged.is_ok()
        });
        let live = Arc::clone(self.live);
        let tell = move |export: &str, why: &Reason| {
            if live.note_denied() <= story::MAX_DENIED {
                audit.emit(|| story::export_denied(&live, export, why));
            }
        };
        let (live, shared) = (Arc::clone(self.live), Arc::clone(self.shared));
        let tell_missing = move |name: &[u8], reason: &'static str| {
            if live.note_missing() > story::MAX_DENIED {
                return;
            }
            shared.config.audit.emit(|| story::export_missing(&live, name, reason));
            super::tell(&shared.chatter.lookups, |held_back| {
                let name = Printable(name).to_string();
                let name = escape::text(&name);
                tracing::info!(
                    reason,
                    held_back,
                    "it asked for an export that isn't there: {name}"
                );
            });
        };
        Watched {
            shared: Arc::clone(self.shared),
            may_open,
            denials,
            tell: Box::new(tell),
            tell_missing: Box::new(tell_missing),
        }
    }

    async fn transmission<S>(
        self,
        stream: S,
        chosen: Option<Negotiated<X::Export>>,
        client: Client,
    ) -> Result<Ending, Failure>
    where
        S: AsyncRead + AsyncWrite,
    {
        let Some(chosen) = chosen else {
            return Ok(Ending::LeftEarly);
        };
        let shared = self.shared;
        let contexts = chosen.contexts.iter();
        let compared = contexts.flat_map(|it| chosen.export.related_exports(it.position));
        let compared: BTreeSet<&String> = compared.collect();
        let compared = compared.into_iter().cloned().collect();
        self.live.note_export(chosen.export.name(), compared);
        Span::current().record("export", chosen.export.name());
        // The rules may have changed since the export was looked up.
        self.live.review(&shared.policy.now(), Timestamp::now())?;
        let _session = shared.slots.session(self.slot, self.live.route.peer, client.identity())?;
        shared.connections.begin(self.live, &*chosen.export);
        tell(&shared.chatter.sessions, |held_back| {
            tracing::info!(tls = client.protection.version, held_back, "reading");
        });
        shared.config.audit.emit(|| {
            let export = chosen.export.name();
            let facts =
                AccessRequest::from_peer(self.live.route.peer).with_identity(client.identity());
            let judged =
                |it: &Numbered| (it.policy.rules.evaluate(&facts.with_export(export)), it.number);
            // If the rules have changed meanwhile, the connection is about to be dismissed.
            let (Ok(rule) | Err(rule), policy) = shared.policy.look(judged);
            story::reading(self.live, client.protection, export, (&rule, policy))
        });
        let throttle = shared.throttles.of(self.live.route.peer, client.identity());
        let metrics = Arc::clone(&self.live.activity);
        let limits = TransmitLimits { throttle, metrics, ..shared.transmit_limits.clone() };
        let keys_exhausted = client.keys_exhausted;
        let shutdown = async {
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = keys_exhausted.cancelled() => {}
            }
        };
        let ended = transmit(stream, chosen, &limits, shutdown).await;
        // TLS may have refused to send the rest by then, which makes the stream fail.
        let is_ended_here = matches!(
            ended,
            Ok(SessionStats { close_reason: CloseReason::ShutDown, .. })
                | Err(SessionError::Io(_) | SessionError::DrainTimeout)
        );
        if is_ended_here && keys_exhausted.is_cancelled() && !self.shutdown.is_cancelled() {
            return Err(Failure::TlsKeyLimit);
        }
        Ok(Ending::Served(ended?))
    }
}

impl Client {
    fn identity(&self) -> Option<&super::access::Identity> {
        self.credentials.as_deref().map(Credentials::identity)
    }
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.identity() {
            Some(identity) => identity.fmt(f),
            None => f.write_str("a client without a certificate"),
        }
    }
}

impl Failure {
    /// Returns the failure for a connection that is still open at the shutdown deadline.
    fn at_the_deadline(live: &Live) -> Self {
        // A client whose requests are all answered just hasn't closed the connection.
        if live.is_busy() { Self::ShutdownDeadline } else { Self::ShuttingDown }
    }

    /// Returns the stable label that counters, logs and audit events use.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Session(_) => "session",
            Self::TlsHandshake(_) => "tls_handshake",
            Self::TlsKeyLimit => "tls_key_limit",
            Self::Panicked => "panicked",
            Self::Credentials(_) => "credentials",
            Self::NotAllowed { .. } => "not_allowed",
            Self::Dismissed(_) => "dismissed",
            Self::Deadline(_) => "deadline",
            Self::Full(full) => full.label(),
            Self::ShuttingDown => "shutting_down",
            Self::ShutdownDeadline => "dropped",
        }
    }
}

/// A phase of the connection with a deadline, which a shutdown interrupts.
#[derive(Clone, Copy)]
struct Phase<'a> {
    name: &'static str,
    ends: Instant,
    shutdown: &'a CancellationToken,
}

impl Phase<'_> {
    async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            () = self.shutdown.cancelled() => Err(Failure::ShuttingDown),
            done = timeout_at(self.ends, work) => done.map_err(|_| Failure::Deadline(self.name)),
        }
    }
}
