//! Takes a connection from the greeting, through TLS, to the point where an export can be chosen,
//! and repeats that on a new connection where a server can't continue on the first.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nbd_server::ReplyMode;
use nbd_server::client::{self, ClientError};
use nbd_server::wire::handshake::ClientFlags;
use rustls::pki_types::ServerName;

use super::advice::{self, Handshake, InClear};
use super::certificate;
use super::greeting::{self, Seen};
use super::reach::{Address, Stream};
use super::report::{Outcome, Report, Step};
use super::tls::{self, Own, Shown};
use super::trouble::{Trouble, within};
use crate::cli::server_target::Wanted;

/// Parameters of connections to the server.
pub(super) struct Visit {
    pub(super) address: Address,
    pub(super) timeout: Duration,
    pub(super) wanted: Wanted,
    pub(super) own: Arc<Own>,
    /// Name that the server's certificate has to be valid for.
    pub(super) name: ServerName<'static>,
}

/// Names of exports, with their descriptions.
pub(super) type Listing = Vec<(String, String)>;

/// A connection after the greeting.
pub(super) struct Greeted {
    stream: Stream,
    flags: ClientFlags,
}

/// A connection that continues in plaintext, or on which the TLS handshake comes next.
pub(super) struct Leg {
    stream: Stream,
    flags: ClientFlags,
    is_tls_next: bool,
    /// Reply to LIST; `None` if LIST has to be repeated inside TLS.
    listing: Option<Result<Listing, Trouble>>,
}

/// A connection on which exports can be chosen.
pub(super) struct Session {
    pub(super) stream: Stream,
    pub(super) flags: ClientFlags,
    pub(super) replies: ReplyMode,
    /// Reply to LIST; `None` if it hasn't been sent yet.
    pub(super) listing: Option<Result<Listing, Trouble>>,
    /// TLS version; `None` in plaintext.
    pub(super) tls: Option<String>,
}

impl Visit {
    pub(super) async fn greet(
        &self,
        mut stream: Stream,
        report: &mut Report,
    ) -> Result<Greeted, Step> {
        let began = Instant::now();
        let seen = greeting::read(&mut stream, self.timeout).await;
        let failed = |trouble: Trouble| {
            Step::bad("greeting", trouble.words()).advise(advice::Server, "its log may say why")
        };
        let seen = seen.map_err(failed)?;
        let step = advice::greeting(&seen, self.timeout).took(began.elapsed());
        let (Seen::Newstyle(greeting), Outcome::Good) = (&seen, step.outcome) else {
            return Err(step);
        };
        let answered =
            within(self.timeout, client::reply_to_greeting(&mut stream, *greeting)).await;
        let flags = answered.map_err(failed)?;
        report.add(step);
        Ok(Greeted { stream, flags })
    }

    /// Sends LIST and STARTTLS in plaintext, and reports the replies.
    pub(super) async fn in_clear(
        &self,
        greeted: Greeted,
        report: &mut Report,
    ) -> Result<Leg, Step> {
        let Greeted { mut stream, mut flags } = greeted;
        let list = within(self.timeout, client::list(&mut stream)).await;
        let nowhere = |trouble: Trouble| {
            let first = list.as_ref().err().map_or("it answers".to_owned(), Trouble::words);
            let again = trouble.words();
            let found = format!("to LIST {first}, and then to a new connection {again}");
            Step::bad("in clear", found).advise(
                advice::Server,
                "it may take one client only, or end with its first one, or have crashed; its log \
                 says which",
            )
        };
        if !matches!(list, Ok(_) | Err(Trouble::Refused { .. })) {
            // This connection can't be used any further.
            (stream, flags) = self.greeted().await.map_err(nowhere)?;
        }
        let mut starttls = match self.wanted {
            Wanted::Never => None,
            _ => Some(within(self.timeout, client::start_tls(&mut stream)).await),
        };
        if matches!((&list, &starttls), (Ok(_), Some(Ok(())))) {
            // Start TLS on a new connection: some servers (nbdkit) still remember inside TLS that
            // they have listed their exports.
            (stream, flags) = self.greeted().await.map_err(nowhere)?;
            starttls = Some(within(self.timeout, client::start_tls(&mut stream)).await);
        }
        let count = list.as_ref().map(Vec::len).map_err(Trouble::clone);
        let seen = InClear { list: count, starttls };
        let step = advice::in_clear(&seen, self.wanted, self.address.is_local());
        if step.outcome == Outcome::Bad {
            return Err(step);
        }
        report.add(step);
        let is_tls_next = seen.offers_tls();
        // The server may list more exports, or other ones, inside TLS.
        let listing = if is_tls_next { None } else { Some(list) };
        Ok(Leg { stream, flags, is_tls_next, listing })
    }

    /// Performs the TLS handshake, if it is next, and negotiates the kind of replies.
    pub(super) async fn begin(&self, leg: Leg, report: &mut Report) -> Result<Session, Step> {
        if !leg.is_tls_next {
            let (stream, replies, trouble) = self.agree(leg.stream).await.map_err(|trouble| {
                Step::bad("replies", trouble.words()).advise(
                    advice::Server,
                    "a server has to answer options that it doesn't know with an error; take a \
                     newer one",
                )
            })?;
            report.add(advice::replies(replies, trouble.as_ref()));
            let Leg { flags, listing, .. } = leg;
            return Ok(Session { stream, flags, replies, listing, tls: None });
        }
        let began = Instant::now();
        let (agreed, shown) = self.handshake(leg.stream).await?;
        let took = began.elapsed();
        let seen = self.seen(&shown);
        let (stream, agreed) = agreed.map_err(|trouble| self.failed(&trouble, &shown))?;
        report.add(
            Step::good(
                "TLS",
                format!("{}, {}, {}", agreed.version, agreed.cipher, agreed.exchange),
            )
            .detail("version", agreed.version.clone())
            .detail("cipher", agreed.cipher)
            .detail("key_exchange", agreed.exchange)
            .took(took),
        );
        report.add(self.certificate(&shown));
        let agreed_on = self.agree(stream).await;
        let (stream, replies, trouble) = agreed_on.map_err(|trouble| {
            advice::after_handshake(&trouble, seen).unwrap_or_else(|| {
                Step::bad("replies", trouble.words()).advise(advice::Server, "its log may say why")
            })
        })?;
        report.add(advice::client_certificate(seen));
        report.add(advice::replies(replies, trouble.as_ref()));
        let (flags, tls) = (leg.flags, Some(agreed.version));
        Ok(Session { stream, flags, replies, listing: None, tls })
    }

    /// Brings a new connection to the same point, without reporting. Starts TLS if `is_tls`.
    pub(super) async fn again(&self, is_tls: bool) -> Result<(Stream, ReplyMode), Trouble> {
        let (mut stream, _) = self.greeted().await?;
        if is_tls {
            within(self.timeout, client::start_tls(&mut stream)).await?;
            let handshake = tls::handshake(stream, self.name.clone(), &self.own, tls::BOTH);
            let (agreed, _) = self.in_time(handshake).await?;
            (stream, _) = agreed?;
        }
        let (stream, replies, _) = self.agree(stream).await?;
        Ok((stream, replies))
    }

    /// Tests whether the server accepts a client without TLS 1.3.
    pub(super) async fn older_tls(&self) -> Step {
        let connected = async {
            let (mut stream, _) = self.greeted().await?;
            within(self.timeout, client::start_tls(&mut stream)).await?;
            Ok(stream)
        };
        let stream = match connected.await {
            Ok(stream) => stream,
            Err(trouble) => return advice::no_second_connection(&trouble),
        };
        let handshake = tls::handshake(stream, self.name.clone(), &self.own, tls::OLD);
        match self.in_time(handshake).await.and_then(|(agreed, _)| agreed) {
            Ok((mut stream, _)) => {
                // The result doesn't matter: the handshake has answered the question.
                let _goodbye = within(self.timeout, client::abort(&mut stream)).await;
                advice::older_tls(Ok(()))
            }
            Err(trouble) => advice::older_tls(Err(&trouble)),
        }
    }

    async fn greeted(&self) -> Result<(Stream, ClientFlags), Trouble> {
        let connected = async { self.address.connect().await.map_err(ClientError::from) };
        let mut stream = within(self.timeout, connected).await?;
        match greeting::read(&mut stream, self.timeout).await? {
            Seen::Newstyle(greeting) => {
                let answered = client::reply_to_greeting(&mut stream, greeting);
                let flags = within(self.timeout, answered).await?;
                Ok((stream, flags))
            }
            Seen::Closed => Err(Trouble::Closed),
            Seen::Silence => Err(Trouble::Silence),
            _ => Err(Trouble::Broken("a second greeting is another one".to_owned())),
        }
    }

    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Trouble> {
        tokio::time::timeout(self.timeout, work).await.map_err(|_| Trouble::Silence)
    }

    async fn handshake(
        &self,
        stream: Stream,
    ) -> Result<(Result<(Stream, tls::Agreed), Trouble>, Shown), Step> {
        let handshake = tls::handshake(stream, self.name.clone(), &self.own, tls::BOTH);
        let done = self.in_time(handshake).await;
        done.map_err(|trouble| advice::handshake(&trouble, Handshake::default()))
    }

    /// Asks for structured replies and extended headers. A refusal isn't an error; that of
    /// structured replies is returned.
    async fn agree(
        &self,
        mut stream: Stream,
    ) -> Result<(Stream, ReplyMode, Option<Trouble>), Trouble> {
        match within(self.timeout, client::negotiate_structured_replies(&mut stream)).await {
            Ok(()) => {}
            Err(refused @ Trouble::Refused { .. }) => {
                return Ok((stream, ReplyMode::Simple, Some(refused)));
            }
            Err(trouble) => return Err(trouble),
        }
        match within(self.timeout, client::negotiate_extended_headers(&mut stream)).await {
            Ok(()) => Ok((stream, ReplyMode::Extended, None)),
            Err(Trouble::Refused { .. }) => Ok((stream, ReplyMode::Structured, None)),
            Err(trouble) => Err(trouble),
        }
    }

    fn seen(&self, shown: &Shown) -> Handshake {
        Handshake { asks: shown.asks_for_certificate, has_own: self.own.certificate.is_some() }
    }

    fn certificate(&self, shown: &Shown) -> Step {
        let authorities = self.own.authorities.as_deref();
        certificate::step(&shown.chain, authorities, &self.name, SystemTime::now())
    }

    /// Builds the step for a failed handshake: the certificate's, if the server isn't trusted.
    fn failed(&self, trouble: &Trouble, shown: &Shown) -> Step {
        if matches!(trouble, Trouble::Tls(rustls::Error::InvalidCertificate(_)))
            && !shown.chain.is_empty()
        {
            let step = self.certificate(shown);
            if step.outcome == Outcome::Bad {
                return step;
            }
        }
        advice::handshake(trouble, self.seen(shown))
    }
}
