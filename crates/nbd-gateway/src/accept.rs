//! Accepts connections, has them admitted, and spawns the tasks that serve them.

use std::sync::Arc;
use std::time::Duration;

use nbd_server::ExportCatalog;
use nbd_telemetry::RateLimit;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::admission::{Admission, AdmissionControl, Admitted};
use crate::listen::{self, AcceptFault, IncomingConnection, Listener};
use crate::session::Sessions;

/// Passes accepted connections on to admission and to their sessions.
#[derive(Debug)]
pub(crate) struct Acceptor<X> {
    pub(crate) admission: Arc<AdmissionControl>,
    pub(crate) sessions: Arc<Sessions<X>>,
    /// Tasks of the open connections.
    pub(crate) connections: TaskTracker,
    pub(crate) shutdown: CancellationToken,
}

impl<X> Clone for Acceptor<X> {
    fn clone(&self) -> Self {
        Self {
            admission: Arc::clone(&self.admission),
            sessions: Arc::clone(&self.sessions),
            connections: self.connections.clone(),
            shutdown: self.shutdown.clone(),
        }
    }
}

impl<X: ExportCatalog> Acceptor<X> {
    /// Accepts connections on one socket until shutdown.
    pub(crate) async fn accept_all(self, listener: Listener) {
        /// Pause after a failed `accept`: long enough for clients to leave, short enough not to be
        /// noticed.
        const PAUSE: Duration = Duration::from_millis(100);
        let faults = RateLimit::new(3, Duration::from_secs(10));
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(incoming) => self.admit(incoming),
                Err(error) => match AcceptFault::classify(&error) {
                    AcceptFault::Connection => {}
                    fault @ (AcceptFault::Shortage | AcceptFault::Listener) => {
                        if let Some(suppressed) = faults.allow() {
                            tracing::error!(
                                reason = fault.label(),
                                held_back = suppressed.field(),
                                "can't accept connections: {error}"
                            );
                        }
                        tokio::time::sleep(PAUSE).await;
                    }
                },
            }
        }
    }

    /// Admits a connection and spawns the task that serves it, or closes it before a byte is sent.
    pub(crate) fn admit(&self, incoming: IncomingConnection) {
        let started = Instant::now();
        let peer = incoming.peer();
        let Some(admission) = self.admission.check(peer) else { return };
        let pending = PendingConnection {
            admission,
            started,
            admission_control: Arc::clone(&self.admission),
            sessions: Arc::clone(&self.sessions),
            shutdown: self.shutdown.clone(),
        };
        self.connections.spawn(async move {
            match incoming {
                IncomingConnection::Tcp(stream, _) => match listen::configure_tcp_stream(&stream) {
                    Ok(()) => pending.serve(stream).await,
                    Err(error) => tracing::debug!(%peer, "connection lost early: {error}"),
                },
                IncomingConnection::Unix(stream) => pending.serve(stream).await,
                IncomingConnection::Pipes(stream) => pending.serve(stream).await,
                IncomingConnection::Vsock(stream, _) => pending.serve(stream).await,
            }
        });
    }
}

/// An accepted connection that is about to be served by its own task.
struct PendingConnection<X> {
    admission: Admission,
    started: Instant,
    admission_control: Arc<AdmissionControl>,
    sessions: Arc<Sessions<X>>,
    shutdown: CancellationToken,
}

impl<X: ExportCatalog> PendingConnection<X> {
    /// Reads the PROXY header first where one is expected, waits for a handshake permit, then serves
    /// the connection.
    async fn serve<S>(self, mut stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { admission, started, admission_control, sessions, shutdown } = self;
        let admitting = async {
            let candidate = match admission {
                Admission::Client(candidate) => candidate,
                Admission::AwaitingProxyHeader { balancer, permit } => {
                    let stream = &mut stream;
                    admission_control
                        .read_forwarded_client(balancer, permit, started, stream)
                        .await?
                }
            };
            admission_control.wait_for_permit(candidate, started).await
        };
        // Only those that have to wait don't get in during a shutdown.
        let admitted = tokio::select! {
            biased;
            admitted = admitting => admitted,
            () = shutdown.cancelled() => None,
        };
        let Some(Admitted { route, reason, permit }) = admitted else { return };
        let id = admission_control.next_id();
        let via = route.via.map(tracing::field::display);
        // Identity and export are recorded once they are known. The span has level ERROR so that
        // log lines of all levels carry its fields.
        let span = tracing::error_span!(
            "connection",
            id,
            peer = %route.peer,
            via,
            identity = tracing::field::Empty,
            export = tracing::field::Empty,
        );
        let serve = async {
            tracing::debug!("accepted: {reason}");
            sessions.serve(id, route, permit, started, stream, &shutdown).await;
        };
        serve.instrument(span).await;
    }
}
