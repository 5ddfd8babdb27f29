//! Takes a connection from the greeting, through TLS, to the point where an export can be chosen,
//! and repeats that on a new connection where a server can't continue on the first.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nbd_server::ReplyMode;
use nbd_server::client::{self, ClientError};
use nbd_server::wire::handshake::ClientFlags;
use rustls::pki_types::ServerName;

use super::advice::{self, ClientAuthState, PlaintextProbe};
use super::certificate;
use super::connect::{Address, BoxedStream};
use super::greeting::{self, ServerGreeting};
use super::probe_error::{ProbeError, with_timeout};
use super::report::{Outcome, Report, Step};
use super::tls::{self, ClientCredentials, HandshakeRecord};
use crate::cli::server_target::TlsUse;
use crate::commands::pki::certificate::CertificateInfo;

/// Time after which a server that has sent nothing may be one of another protocol: NBD servers
/// send their greeting at once, unless they are busy.
const SILENCE: Duration = Duration::from_secs(1);

/// Parameters of connections to the server.
pub(super) struct Probe {
    pub(super) address: Address,
    pub(super) timeout: Duration,
    pub(super) tls_use: TlsUse,
    pub(super) credentials: Arc<ClientCredentials>,
    /// Name that the server's certificate has to be valid for.
    pub(super) name: ServerName<'static>,
}

/// Names of exports, with their descriptions.
pub(super) type ExportNames = Vec<(String, String)>;

/// A connection after the greeting.
pub(super) struct GreetedConnection {
    stream: BoxedStream,
    flags: ClientFlags,
}

/// A connection that continues in plaintext, or on which the TLS handshake comes next.
pub(super) struct PlaintextSession {
    stream: BoxedStream,
    flags: ClientFlags,
    is_tls_next: bool,
    /// Reply to LIST; `None` if LIST has to be repeated inside TLS.
    listing: Option<Result<ExportNames, ProbeError>>,
}

/// A connection on which exports can be chosen.
pub(super) struct ProbeSession {
    pub(super) stream: BoxedStream,
    pub(super) flags: ClientFlags,
    pub(super) replies: ReplyMode,
    /// Reply to LIST; `None` if it hasn't been sent yet.
    pub(super) listing: Option<Result<ExportNames, ProbeError>>,
    /// TLS version; `None` in plaintext.
    pub(super) tls: Option<String>,
}

impl Probe {
    pub(super) async fn greet(
        &self,
        mut stream: BoxedStream,
        report: &mut Report,
    ) -> Result<GreetedConnection, Step> {
        let began = Instant::now();
        let failed = |failure: ProbeError| {
            Step::bad("greeting", failure.label(), failure.to_string())
                .advise(advice::Server, "check its log")
        };
        let observed = match self.read_greeting(&mut stream).await.map_err(failed)? {
            ServerGreeting::Silence => {
                // A server that serves one client at a time (openssl s_server, Python's
                // http.server) has been waiting for the first one to send something.
                drop(stream);
                let protocol = greeting::identify_silent_server(&self.address).await;
                let observed = protocol.map_or(ServerGreeting::Silence, ServerGreeting::Foreign);
                return Err(advice::greeting(&observed, self.timeout).took(began.elapsed()));
            }
            observed => observed,
        };
        let step = advice::greeting(&observed, self.timeout).took(began.elapsed());
        let (ServerGreeting::Newstyle(greeting), Outcome::Good) = (&observed, step.outcome) else {
            return Err(step);
        };
        let answered =
            with_timeout(self.timeout, client::reply_to_greeting(&mut stream, *greeting)).await;
        let flags = answered.map_err(failed)?;
        report.add(step);
        Ok(GreetedConnection { stream, flags })
    }

    /// Reads the greeting. If the server is silent, finds out whether it speaks another protocol,
    /// while it may still send its greeting.
    async fn read_greeting(&self, stream: &mut BoxedStream) -> Result<ServerGreeting, ProbeError> {
        let mut reading = pin!(greeting::read(stream, self.timeout));
        let mut identifying = pin!(async {
            tokio::time::sleep(SILENCE.min(self.timeout)).await;
            greeting::identify_silent_server(&self.address).await
        });
        tokio::select! {
            read = &mut reading => read,
            protocol = &mut identifying => match protocol {
                Some(protocol) => Ok(ServerGreeting::Foreign(protocol)),
                None => reading.await,
            },
        }
    }

    /// Sends LIST and STARTTLS in plaintext, and reports the replies.
    pub(super) async fn probe_plaintext(
        &self,
        greeted: GreetedConnection,
        report: &mut Report,
    ) -> Result<PlaintextSession, Step> {
        let GreetedConnection { mut stream, mut flags } = greeted;
        let list = with_timeout(self.timeout, client::list(&mut stream)).await;
        let nowhere = |failure: ProbeError| {
            let first = list.as_ref().err().map_or("answered".to_owned(), ProbeError::to_string);
            let found = format!("LIST: {first}; then a new connection: {failure}");
            Step::bad("in clear", "no_second_connection", found).advise(
                advice::Server,
                "it accepts one client only, exits after the first, or has crashed; check its log",
            )
        };
        if !matches!(list, Ok(_) | Err(ProbeError::OptionRefused { .. })) {
            // This connection can't be used any further.
            (stream, flags) = self.connect_and_greet().await.map_err(nowhere)?;
        }
        let mut starttls = match self.tls_use {
            TlsUse::Never => None,
            _ => Some(with_timeout(self.timeout, client::start_tls(&mut stream)).await),
        };
        if matches!((&list, &starttls), (Ok(_), Some(Ok(())))) {
            // Start TLS on a new connection: some servers (nbdkit) still remember inside TLS that
            // they have listed their exports.
            (stream, flags) = self.connect_and_greet().await.map_err(nowhere)?;
            starttls = Some(with_timeout(self.timeout, client::start_tls(&mut stream)).await);
        }
        let count = list.as_ref().map(Vec::len).map_err(ProbeError::clone);
        let observed = PlaintextProbe { list: count, starttls };
        let step = advice::plaintext(&observed, self.tls_use, self.address.is_local());
        if step.outcome == Outcome::Bad {
            return Err(step);
        }
        report.add(step);
        let is_tls_next = observed.offers_tls();
        // The server may list more exports, or other ones, inside TLS.
        let listing = if is_tls_next { None } else { Some(list) };
        Ok(PlaintextSession { stream, flags, is_tls_next, listing })
    }

    /// Performs the TLS handshake, if it is next, and negotiates the kind of replies.
    pub(super) async fn negotiate(
        &self,
        plaintext: PlaintextSession,
        report: &mut Report,
    ) -> Result<ProbeSession, Step> {
        if !plaintext.is_tls_next {
            let (stream, replies, failure) =
                self.negotiate_replies(plaintext.stream).await.map_err(|failure| {
                    Step::bad("replies", failure.label(), failure.to_string()).advise(
                        advice::Server,
                        "a server must answer unknown options with an error: use a newer one",
                    )
                })?;
            report.add(advice::replies(replies, failure.as_ref()));
            let PlaintextSession { flags, listing, .. } = plaintext;
            return Ok(ProbeSession { stream, flags, replies, listing, tls: None });
        }
        let began = Instant::now();
        let (agreed, record) = self.handshake(plaintext.stream).await?;
        let took = began.elapsed();
        let observed = self.client_auth_state(&record);
        let (stream, agreed) =
            agreed.map_err(|failure| self.handshake_failed(&failure, &record))?;
        report.add(
            Step::good(
                "TLS",
                format!("{}, {}, {}", agreed.version, agreed.cipher, agreed.key_exchange),
            )
            .detail("version", agreed.version.clone())
            .detail("cipher", agreed.cipher)
            .detail("key_exchange", agreed.key_exchange)
            .took(took),
        );
        report.add(self.certificate(&record));
        let agreed_on = self.negotiate_replies(stream).await;
        let (stream, replies, failure) = agreed_on.map_err(|failure| {
            advice::rejected_after_handshake(&failure, observed).unwrap_or_else(|| {
                Step::bad("replies", failure.label(), failure.to_string())
                    .advise(advice::Server, "check its log")
            })
        })?;
        report.add(self.client_certificate(observed));
        report.add(advice::replies(replies, failure.as_ref()));
        let (flags, tls) = (plaintext.flags, Some(agreed.version));
        Ok(ProbeSession { stream, flags, replies, listing: None, tls })
    }

    /// Brings a new connection to the same point, without reporting. Starts TLS if `is_tls`.
    pub(super) async fn reconnect(
        &self,
        is_tls: bool,
    ) -> Result<(BoxedStream, ReplyMode), ProbeError> {
        let (mut stream, _) = self.connect_and_greet().await?;
        if is_tls {
            with_timeout(self.timeout, client::start_tls(&mut stream)).await?;
            let handshake =
                tls::handshake(stream, self.name.clone(), &self.credentials, tls::TLS_1_2_AND_1_3);
            let (agreed, _) = self.with_timeout(handshake).await?;
            (stream, _) = agreed?;
        }
        let (stream, replies, _) = self.negotiate_replies(stream).await?;
        Ok((stream, replies))
    }

    /// Tests whether the server accepts a client without TLS 1.3.
    pub(super) async fn probe_tls_1_2(&self) -> Step {
        let connected = async {
            let (mut stream, _) = self.connect_and_greet().await?;
            with_timeout(self.timeout, client::start_tls(&mut stream)).await?;
            Ok(stream)
        };
        let stream = match connected.await {
            Ok(stream) => stream,
            Err(failure) => return advice::no_second_connection(&failure),
        };
        let handshake =
            tls::handshake(stream, self.name.clone(), &self.credentials, tls::TLS_1_2_ONLY);
        match self.with_timeout(handshake).await.and_then(|(agreed, _)| agreed) {
            Ok((mut stream, _)) => {
                // The result doesn't matter: the handshake has answered the question.
                let _goodbye = with_timeout(self.timeout, client::abort(&mut stream)).await;
                advice::older_tls(Ok(()))
            }
            Err(failure) => advice::older_tls(Err(&failure)),
        }
    }

    async fn connect_and_greet(&self) -> Result<(BoxedStream, ClientFlags), ProbeError> {
        let connected = async { self.address.connect().await.map_err(ClientError::from) };
        let mut stream = with_timeout(self.timeout, connected).await?;
        match greeting::read(&mut stream, self.timeout).await? {
            ServerGreeting::Newstyle(greeting) => {
                let answered = client::reply_to_greeting(&mut stream, greeting);
                let flags = with_timeout(self.timeout, answered).await?;
                Ok((stream, flags))
            }
            ServerGreeting::Closed => Err(ProbeError::Closed),
            ServerGreeting::Silence => Err(ProbeError::Timeout),
            _ => Err(ProbeError::ProtocolViolation(
                "the second connection has a different greeting".to_owned(),
            )),
        }
    }

    async fn with_timeout<T>(&self, work: impl Future<Output = T>) -> Result<T, ProbeError> {
        tokio::time::timeout(self.timeout, work).await.map_err(|_| ProbeError::Timeout)
    }

    async fn handshake(
        &self,
        stream: BoxedStream,
    ) -> Result<(Result<(BoxedStream, tls::TlsParameters), ProbeError>, HandshakeRecord), Step>
    {
        let handshake =
            tls::handshake(stream, self.name.clone(), &self.credentials, tls::TLS_1_2_AND_1_3);
        let done = self.with_timeout(handshake).await;
        done.map_err(|failure| advice::handshake_failed(&failure, ClientAuthState::default()))
    }

    /// Asks for structured replies and extended headers. A refusal isn't an error; that of
    /// structured replies is returned.
    async fn negotiate_replies(
        &self,
        mut stream: BoxedStream,
    ) -> Result<(BoxedStream, ReplyMode, Option<ProbeError>), ProbeError> {
        match with_timeout(self.timeout, client::negotiate_structured_replies(&mut stream)).await {
            Ok(()) => {}
            Err(refused @ ProbeError::OptionRefused { .. }) => {
                return Ok((stream, ReplyMode::Simple, Some(refused)));
            }
            Err(failure) => return Err(failure),
        }
        match with_timeout(self.timeout, client::negotiate_extended_headers(&mut stream)).await {
            Ok(()) => Ok((stream, ReplyMode::Extended, None)),
            Err(ProbeError::OptionRefused { .. }) => Ok((stream, ReplyMode::Structured, None)),
            Err(failure) => Err(failure),
        }
    }

    fn client_auth_state(&self, record: &HandshakeRecord) -> ClientAuthState {
        ClientAuthState {
            is_certificate_requested: record.asks_for_certificate,
            has_certificate: self.credentials.certificate.is_some(),
        }
    }

    fn certificate(&self, record: &HandshakeRecord) -> Step {
        let authorities = self.credentials.trusted_cas.as_deref();
        certificate::step(&record.chain, authorities, &self.name, SystemTime::now())
    }

    /// Builds the step about this client's own certificate.
    fn client_certificate(&self, observed: ClientAuthState) -> Step {
        let step = advice::client_certificate(observed);
        let own = self.credentials.certificate.as_ref().and_then(|own| own.cert.first().cloned());
        match own.and_then(|own| CertificateInfo::from_der(own).ok()) {
            Some(own) => {
                let now = SystemTime::now();
                advice::client_certificate_expiry(step, own.not_before, own.not_after, now)
            }
            None => step,
        }
    }

    /// Builds the step for a failed handshake: the certificate's, if the server isn't trusted.
    fn handshake_failed(&self, failure: &ProbeError, record: &HandshakeRecord) -> Step {
        if matches!(failure, ProbeError::Tls(rustls::Error::InvalidCertificate(_)))
            && !record.chain.is_empty()
        {
            let step = self.certificate(record);
            if step.outcome == Outcome::Bad {
                return step;
            }
        }
        advice::handshake_failed(failure, self.client_auth_state(record))
    }
}
