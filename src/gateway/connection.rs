//! One client's story, from accept to goodbye.

use std::future::Future;
use std::io;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::slots::{Full, Place};
use super::{Shared, tls};
use crate::nbd::{
    Chosen, Export, Exports, Farewell, PlaintextOutcome, Security, SessionError, Summary, greet,
    negotiate, plaintext_leg, transmit,
};

/// How a connection ended.
enum Ending {
    /// It left before it chose an export, as `nbdinfo --list` does.
    LeftEarly,
    /// It was served.
    Served(Summary),
}

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the TLS handshake failed: {}", tls::explain(.0))]
    TlsHandshake(io::Error),
    #[error("{0} took longer than allowed")]
    Deadline(&'static str),
    #[error("{0}")]
    Full(#[from] Full),
    #[error("this server is shutting down")]
    ShuttingDown,
}

/// Serves one client and says how that ended.
pub(super) async fn serve<S, X>(
    stream: S,
    slot: Place,
    shared: &Shared<X>,
    shutdown: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    let started = Instant::now();
    let ended = talk(stream, slot, shared, shutdown, started).await;
    let duration = started.elapsed();
    match ended {
        Ok(Ending::LeftEarly) => tracing::debug!(?duration, "left without choosing an export"),
        Ok(Ending::Served(Summary { farewell, requests, bytes })) => {
            if let Some(held_back) = shared.chatter.sessions.allow() {
                let how = match farewell {
                    Farewell::ShutDown => "closed for shutdown",
                    Farewell::Disconnected | Farewell::HungUp => "left",
                };
                let held_back = held_back.field();
                tracing::info!(requests, bytes, ?duration, held_back, "{how}");
            }
        }
        Err(Failure::ShuttingDown) => tracing::debug!("closed for shutdown"),
        Err(failure) => {
            if let Some(held_back) = shared.chatter.failures.allow() {
                tracing::warn!(?duration, held_back = held_back.field(), "closed: {failure}");
            }
        }
    }
}

/// The story: greeting, TLS if it is required, negotiation, transmission.
async fn talk<S, X>(
    mut stream: S,
    slot: Place,
    shared: &Shared<X>,
    shutdown: &CancellationToken,
    started: Instant,
) -> Result<Ending, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    let timeouts = &shared.config.timeouts;
    let handshake =
        Phase { name: "the NBD handshake", ends: started + timeouts.handshake, shutdown };

    let flags = handshake.run(greet(&mut stream)).await??;
    let Some(tls) = &shared.tls else {
        let security = Security::Plain;
        let negotiated = negotiate(&mut stream, flags, security, &shared.exports);
        let chosen = handshake.run(negotiated).await??;
        return transmission(stream, chosen, slot, shared, shutdown, "none").await;
    };

    match handshake.run(plaintext_leg(&mut stream, flags)).await?? {
        PlaintextOutcome::Ended => return Ok(Ending::LeftEarly),
        PlaintextOutcome::StartTls => {}
    }
    let tls_handshake = Phase {
        name: "the TLS handshake",
        ends: handshake.ends.min(Instant::now() + timeouts.tls_handshake),
        shutdown,
    };
    let accepted = tls_handshake.run(tls.0.accept(stream)).await?;
    let mut stream = accepted.map_err(Failure::TlsHandshake)?;
    let version = match stream.get_ref().1.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLS 1.3",
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLS 1.2",
        _ => "TLS",
    };
    let negotiated = negotiate(&mut stream, flags, Security::Tls, &shared.exports);
    let chosen = handshake.run(negotiated).await??;
    transmission(stream, chosen, slot, shared, shutdown, version).await
}

async fn transmission<S, X>(
    stream: S,
    chosen: Option<Chosen<X::Export>>,
    slot: Place,
    shared: &Shared<X>,
    shutdown: &CancellationToken,
    security: &'static str,
) -> Result<Ending, Failure>
where
    S: AsyncRead + AsyncWrite,
    X: Exports,
{
    let Some(chosen) = chosen else {
        return Ok(Ending::LeftEarly);
    };
    let _session = shared.slots.session(slot)?;
    if let Some(held_back) = shared.chatter.sessions.allow() {
        tracing::info!(
            export = chosen.export.name(),
            tls = security,
            held_back = held_back.field(),
            "reading"
        );
    }
    let limits = &shared.transmit_limits;
    let summary = transmit(stream, chosen, limits, shutdown.cancelled()).await?;
    Ok(Ending::Served(summary))
}

/// A part of the story that has to be over by a certain time.
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
