//! One admitted connection: [`Sessions::serve`] registers it and watches for dismissal and
//! shutdown, and [`AdmittedConnection::run_phases`] runs its phases: greeting, TLS, authorization,
//! negotiation, transmission. The protocol itself is that of [`nbd_server`].

mod audited_exports;
mod handshake_pool;
mod throttles;

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use nbd_server::budget::Budget;
use nbd_server::wire::handshake::ClientFlags;
use nbd_server::{
    CloseReason, Export, ExportCatalog, Negotiated, NegotiationLimits, NegotiationQuota,
    PlaintextOutcome, Security, SessionError, SessionStats, TransmitLimits, greet, negotiate,
    plaintext_leg,
};
use rustls::ProtocolVersion;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use tracing::field::display;

use crate::access::{AccessRequest, Identity, Timestamp};
use crate::admission::slots::{SlotPermit, Slots};
use crate::config::{Config, Timeouts};
use crate::observer::{Observer, StreamEncryption};
use crate::outcome::{ConnectionFailure, ConnectionOutcome};
use crate::policy::{ActivePolicy, VersionedPolicy};
use crate::registry::{ConnectionRegistry, RegistryEntry};
use crate::route::Route;
use crate::tls::{self, Credentials, EncryptedStream, HandshakeFailure, RecordCountingStream};
use audited_exports::AuditedExports;
use handshake_pool::HandshakePool;
use throttles::Throttles;

/// Serves admitted connections.
#[derive(Debug)]
pub(crate) struct Sessions<X> {
    policy: Arc<ActivePolicy>,
    exports: Arc<ArcSwap<X>>,
    registry: Arc<ConnectionRegistry>,
    slots: Arc<Slots>,
    observer: Arc<Observer>,
    handshake_pool: HandshakePool,
    throttles: Throttles,
    timeouts: Timeouts,
    negotiation: NegotiationLimits,
    transmit_limits: TransmitLimits,
    /// Cancelled when the shutdown timeout expires; remaining connections are then dropped.
    pub(crate) shutdown_deadline: CancellationToken,
}

/// A connection whose address was admitted.
struct AdmittedConnection<'a, X> {
    sessions: &'a Sessions<X>,
    entry: &'a Arc<RegistryEntry>,
    permit: SlotPermit,
    /// Time at which the connection was accepted; the handshake timeout counts from it.
    started: Instant,
    shutdown: &'a CancellationToken,
}

/// State of a client at the beginning of its negotiation.
struct Negotiation {
    flags: ClientFlags,
    security: Security,
    quota: NegotiationQuota,
}

/// An authenticated client, or one without a certificate.
struct AuthenticatedClient {
    credentials: Option<Arc<Credentials>>,
    encryption: StreamEncryption,
    /// Cancelled when the stream's TLS keys are nearly used up.
    keys_exhausted: CancellationToken,
}

impl<X: ExportCatalog> Sessions<X> {
    /// Starts the handshake pool.
    ///
    /// # Errors
    /// No thread can be created.
    pub(crate) fn new(
        config: &Config,
        policy: Arc<ActivePolicy>,
        exports: Arc<ArcSwap<X>>,
        registry: Arc<ConnectionRegistry>,
        slots: Arc<Slots>,
        budget: Arc<Budget>,
        observer: Arc<Observer>,
    ) -> io::Result<Self> {
        let Config { limits, timeouts, .. } = config;
        Ok(Self {
            policy,
            exports,
            registry,
            slots,
            observer,
            handshake_pool: HandshakePool::new()?,
            throttles: Throttles::new(limits.rate),
            timeouts: *timeouts,
            negotiation: limits.negotiation,
            transmit_limits: TransmitLimits {
                budget,
                throttle: None,
                idle: timeouts.idle,
                stall: timeouts.stall,
                drain: timeouts.stall,
                // Replaced for each connection.
                metrics: Arc::default(),
            },
            shutdown_deadline: CancellationToken::new(),
        })
    }

    /// Serves an admitted connection, accepted at the time `started`, until it ends. The observer
    /// is told how, also if the future is dropped.
    pub(crate) async fn serve<S>(
        &self,
        id: u64,
        route: Route,
        permit: SlotPermit,
        started: Instant,
        stream: S,
        shutdown: &CancellationToken,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let registration = self.registry.register(id, route);
        let entry = &registration.entry;
        let connection = AdmittedConnection { sessions: self, entry, permit, started, shutdown };
        let audit = self.observer.admitted(entry, started);
        let outcome = tokio::select! {
            biased;
            why = entry.wait_until_dismissed() => Err(why.into()),
            () = self.shutdown_deadline.cancelled() => {
                Err(ConnectionFailure::at_shutdown_deadline(entry))
            }
            outcome = connection.run_phases(stream) => outcome,
        };
        audit.ended(&outcome);
    }
}

impl<X: ExportCatalog> AdmittedConnection<'_, X> {
    /// Runs all phases: greeting, TLS if the policy requires it, authorization, negotiation,
    /// transmission.
    async fn run_phases<S>(self, mut stream: S) -> Result<ConnectionOutcome, ConnectionFailure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let timeouts = &self.sessions.timeouts;
        let handshake = PhaseDeadline {
            name: "NBD handshake",
            ends: self.started + timeouts.handshake,
            shutdown: self.shutdown,
        };
        let flags = handshake.run(greet(&mut stream)).await??;
        let mut quota = self.sessions.negotiation.quota();
        // Doesn't hold the policy itself, which would stay in memory for the whole session.
        let (in_clear, number) =
            self.sessions.policy.with(|it| (it.policy.tls.is_none(), it.number));
        if in_clear {
            let client = self.authorize_client(
                None,
                StreamEncryption { version: "none", cipher: None },
                number,
            )?;
            let negotiation = Negotiation { flags, security: Security::Plain, quota };
            let (stream, chosen) = self.negotiate(stream, &client, negotiation, &handshake).await?;
            return self.transmit(stream, chosen, client).await;
        }

        match handshake.run(plaintext_leg(&mut stream, flags, &mut quota)).await?? {
            PlaintextOutcome::ClientLeft => return Ok(ConnectionOutcome::LeftEarly),
            PlaintextOutcome::StartTls => {}
        }
        let ends = handshake.ends.min(Instant::now() + timeouts.tls_handshake);
        let tls_phase = PhaseDeadline { ends, ..handshake };
        let (stream, client) = self.tls_handshake(stream, &tls_phase).await?;
        let negotiation = Negotiation { flags, security: Security::Tls, quota };
        let (stream, chosen) = self.negotiate(stream, &client, negotiation, &handshake).await?;
        self.transmit(stream, chosen, client).await
    }

    /// Negotiates an export on the handshake threads. Options may cost more than reads, and
    /// established readers must not wait for clients that may never be authorized.
    async fn negotiate<S>(
        &self,
        mut stream: S,
        client: &AuthenticatedClient,
        negotiation: Negotiation,
        phase: &PhaseDeadline<'_>,
    ) -> Result<(S, Option<Negotiated<X::Export>>), ConnectionFailure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let exports = self.audited_exports(client);
        let Negotiation { flags, security, mut quota } = negotiation;
        let negotiating = async move {
            let chosen = negotiate(&mut stream, flags, security, &exports, &mut quota).await;
            chosen.map(|chosen| (stream, chosen))
        };
        let negotiated = phase.run(self.sessions.handshake_pool.run(negotiating)).await?;
        Ok(negotiated.ok_or(ConnectionFailure::Panicked)??)
    }

    /// Performs the TLS handshake and authenticates the client.
    async fn tls_handshake<S>(
        &self,
        stream: S,
        phase: &PhaseDeadline<'_>,
    ) -> Result<(TlsStream<RecordCountingStream<S>>, AuthenticatedClient), ConnectionFailure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let active = self.sessions.policy.load();
        // A reload can't switch TLS on or off, so this isn't reached without TLS.
        let Some(tls) = &active.policy.tls else { return Err(ConnectionFailure::ShuttingDown) };
        let tls = tls.clone();
        let handshake = async move { tls::handshake(stream, &tls).await };
        let EncryptedStream { stream, keys_exhausted } = match phase
            .run(self.sessions.handshake_pool.run(handshake))
            .await
        {
            Err(ConnectionFailure::Deadline(_)) => return Err(HandshakeFailure::timed_out().into()),
            shaken => shaken?.ok_or(ConnectionFailure::Panicked)??,
        };
        let (_, session) = stream.get_ref();
        let version = match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
            Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
            _ => "TLS",
        };
        let cipher = session.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        let encryption = StreamEncryption { version, cipher };
        let credentials = match session.peer_certificates() {
            Some(chain) => Some(Arc::new(Credentials::from_chain(chain, Timestamp::now())?)),
            None => None,
        };
        let client = self.authorize_client(credentials, encryption, active.number)?;
        Ok((stream, AuthenticatedClient { keys_exhausted, ..client }))
    }

    /// Authorizes the client now that its identity is known.
    ///
    /// `verified_by` is the number of the policy that verified the credentials. Another one may be
    /// active by now, so they are reviewed against the current policy.
    fn authorize_client(
        &self,
        credentials: Option<Arc<Credentials>>,
        encryption: StreamEncryption,
        verified_by: u64,
    ) -> Result<AuthenticatedClient, ConnectionFailure> {
        self.entry.set_authentication(credentials.clone(), verified_by, encryption.tls());
        let active = self.sessions.policy.load();
        let client = AuthenticatedClient {
            credentials,
            encryption,
            keys_exhausted: CancellationToken::new(),
        };
        if let Some(identity) = client.identity() {
            Span::current().record("identity", display(identity));
        }
        let request =
            AccessRequest::from_peer(self.entry.route.peer).with_identity(client.identity());
        if let Err(why) = active.policy.rules.evaluate(&request) {
            return Err(ConnectionFailure::NotAllowed { client: client.to_string(), why });
        }
        self.entry.review(&active, Timestamp::now())?;
        if let Some(credentials) = &client.credentials {
            tracing::debug!("authenticated: {client}");
            self.sessions.observer.authenticated(credentials, Timestamp::now());
        }
        Ok(client)
    }

    /// Returns the client's view of the exports. Each lookup is checked against the rules active at
    /// that time.
    fn audited_exports(&self, client: &AuthenticatedClient) -> AuditedExports<X> {
        AuditedExports::new(
            Arc::clone(&self.sessions.exports),
            Arc::clone(&self.sessions.policy),
            Arc::clone(&self.sessions.observer),
            Arc::clone(self.entry),
            client.credentials.clone(),
        )
    }

    /// Lets the client read the chosen export, if any, once it has a session permit.
    async fn transmit<S>(
        self,
        stream: S,
        chosen: Option<Negotiated<X::Export>>,
        client: AuthenticatedClient,
    ) -> Result<ConnectionOutcome, ConnectionFailure>
    where
        S: AsyncRead + AsyncWrite,
    {
        let Some(chosen) = chosen else {
            return Ok(ConnectionOutcome::LeftEarly);
        };
        let sessions = self.sessions;
        let (export, peer) = (chosen.export.name(), self.entry.route.peer);
        let contexts = chosen.contexts.iter();
        let compared = contexts.flat_map(|it| chosen.export.related_exports(it.position));
        let compared: BTreeSet<&String> = compared.collect();
        let compared = compared.into_iter().cloned().collect();
        self.entry.set_export(export, compared);
        Span::current().record("export", export);
        // The rules may have changed since the export was looked up.
        self.entry.review(&sessions.policy.load(), Timestamp::now())?;
        let _session = sessions.slots.session(self.permit, peer, client.identity())?;
        sessions.registry.start_reading(self.entry, &*chosen.export);
        sessions.observer.reading(self.entry, client.encryption, export, || {
            let request = AccessRequest::from_peer(peer).with_identity(client.identity());
            let request = request.with_export(export);
            let decide = |it: &VersionedPolicy| (it.policy.rules.evaluate(&request), it.number);
            // If the rules have changed meanwhile, the connection is about to be dismissed.
            let (Ok(rule) | Err(rule), policy) = sessions.policy.with(decide);
            (rule, policy)
        });
        let throttle = sessions.throttles.get_or_create(peer, client.identity());
        let metrics = Arc::clone(&self.entry.activity);
        let limits = TransmitLimits { throttle, metrics, ..sessions.transmit_limits.clone() };
        let keys_exhausted = client.keys_exhausted;
        let shutdown = async {
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = keys_exhausted.cancelled() => {}
            }
        };
        let ended = nbd_server::transmit(stream, chosen, &limits, shutdown).await;
        // TLS may have refused to send the rest by then, which makes the stream fail.
        let is_ended_here = matches!(
            ended,
            Ok(SessionStats { close_reason: CloseReason::ShutDown, .. })
                | Err(SessionError::Io(_) | SessionError::DrainTimeout)
        );
        if is_ended_here && keys_exhausted.is_cancelled() && !self.shutdown.is_cancelled() {
            return Err(ConnectionFailure::TlsKeyLimit);
        }
        Ok(ConnectionOutcome::Served(ended?))
    }
}

impl AuthenticatedClient {
    fn identity(&self) -> Option<&Identity> {
        self.credentials.as_deref().map(Credentials::identity)
    }
}

impl std::fmt::Display for AuthenticatedClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.identity() {
            Some(identity) => identity.fmt(f),
            None => f.write_str("a client without a certificate"),
        }
    }
}

/// A phase of the connection with a deadline, which a shutdown interrupts.
#[derive(Clone, Copy)]
struct PhaseDeadline<'a> {
    name: &'static str,
    ends: Instant,
    shutdown: &'a CancellationToken,
}

impl PhaseDeadline<'_> {
    async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, ConnectionFailure> {
        tokio::select! {
            () = self.shutdown.cancelled() => Err(ConnectionFailure::ShuttingDown),
            done = timeout_at(self.ends, work) => done.map_err(|_| ConnectionFailure::Deadline(self.name)),
        }
    }
}
