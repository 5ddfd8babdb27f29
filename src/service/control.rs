//! The control socket: `hexz-nbd reload` connects to it, and learns what the reload changed, or why
//! it failed. A signal can't report that, and a service manager asks for it (`ExecReload=`).
//!
//! It is a Unix socket that only its owner and root can use. A client sends [`RELOAD`]; the server
//! answers with a [`ReloadReply`] per line, as JSON, and closes the connection.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbd_gateway::listen::{
    BindError, BoundSocket, IncomingConnection, ListenAddress, Listener, SocketMode,
    SocketPermissions,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::exit_status::Failure;

/// Request for a reload.
pub(crate) const RELOAD: &[u8] = b"reload\n";

/// Maximum number of clients at a time; others wait.
const MAX_CLIENTS: usize = 16;

/// Timeout for a request to arrive, and for a reply to be taken.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a connection couldn't be accepted, for example for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Maximum number of replies to a request.
const MAX_REPLIES: usize = 2;

/// Maximum number of requests that wait for the reloader.
pub(super) const MAX_REQUESTS: usize = MAX_CLIENTS;

/// Progress of a reload. The last reply is [`Served`](Self::Served) or [`Failed`](Self::Failed).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum ReloadReply {
    /// The new policy is active, and archives are being opened.
    Activated(Activation),
    /// The new exports are served.
    Served {
        /// Description of the exports.
        exports: String,
    },
    /// The reload was rejected, or, after [`Activated`](Self::Activated), the archives were.
    Failed {
        /// Exit status that a start would have.
        exit_status: u8,
        /// Label of the cause.
        reason: String,
        hint: Option<String>,
        message: String,
    },
}

/// Consequences of a reload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Activation {
    /// Description of who may connect.
    pub(crate) open_to: String,
    /// Number of connections dropped because the new policy doesn't allow them.
    pub(crate) dropped: usize,
    /// Descriptions of what has changed.
    pub(crate) changes: Vec<String>,
    /// Options that were changed but only take effect after a restart.
    pub(crate) needs_restart: Vec<String>,
}

impl ReloadReply {
    /// Creates the reply for a failure. `message` describes it, with its consequence.
    pub(super) fn failed(error: &Failure, message: String) -> Self {
        Self::Failed {
            exit_status: error.exit_status(),
            reason: error.label().to_owned(),
            hint: error.hint().map(str::to_owned),
            message,
        }
    }
}

/// A client that waits for the result of a reload.
#[derive(Debug)]
pub(super) struct Requester(mpsc::Sender<ReloadReply>);

impl Requester {
    /// Sends a reply, unless the client is gone.
    pub(super) fn reply(&self, reply: ReloadReply) {
        // The channel has room for all replies to a request.
        self.0.try_send(reply).unwrap_or_default();
    }
}

/// Clients whose reload is active, and that wait for the archives to be opened. Clients of a reload
/// that a newer one supersedes get the result of the newer one.
#[derive(Debug, Clone, Default)]
pub(super) struct WaitingRequesters(Arc<Mutex<Vec<Requester>>>);

impl WaitingRequesters {
    pub(super) fn extend(&self, requesters: Vec<Requester>) {
        let mut waiting = self.0.lock();
        // Those that are gone don't accumulate while archives take long to open.
        waiting.retain(|requester| !requester.0.is_closed());
        waiting.extend(requesters);
    }

    /// Sends the last reply to all of them.
    pub(super) fn finish(&self, reply: &ReloadReply) {
        for requester in self.0.lock().drain(..) {
            requester.reply(reply.clone());
        }
    }
}

/// Binds the control socket. Must be called before other threads create files; see
/// [`BoundSocket::bind`].
pub(super) fn bind(path: &Path) -> Result<BoundSocket, BindError> {
    let address = ListenAddress::Unix(path.to_owned());
    let permissions = SocketPermissions { mode: Some(SocketMode::OWNER_ONLY), group: None };
    BoundSocket::bind(&address, &permissions).map_err(|error| BindError { address, error })
}

/// Accepts clients, and passes their requests to the reloader.
pub(super) async fn serve(listener: Listener, requests: mpsc::Sender<Requester>) {
    let permits = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(IncomingConnection::Unix(stream)) => {
                let requests = requests.clone();
                clients.spawn(async move {
                    if let Err(error) = answer(stream, &requests).await {
                        tracing::debug!("control socket: {error}");
                    }
                    drop(permit);
                });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!("control socket: can't accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one client.
async fn answer(mut stream: UnixStream, requests: &mpsc::Sender<Requester>) -> io::Result<()> {
    let mut request = [0; RELOAD.len()];
    timeout(CLIENT_TIMEOUT, stream.read_exact(&mut request)).await??;
    if request != RELOAD {
        return Err(io::Error::other("unknown request"));
    }
    let (requester, mut replies) = mpsc::channel(MAX_REPLIES);
    if requests.send(Requester(requester)).await.is_err() {
        return Ok(());
    }
    let (mut reader, mut writer) = stream.split();
    let mut ended = [0];
    loop {
        let reply = tokio::select! {
            reply = replies.recv() => reply,
            // The client has left, or sends what nobody asked for.
            _ = reader.read(&mut ended) => return Ok(()),
        };
        // None: this was the last one, or the server shuts down.
        let Some(reply) = reply else { return Ok(()) };
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        timeout(CLIENT_TIMEOUT, writer.write_all(&line)).await??;
    }
}
