//! Reading anew who may come in, while those who are in go on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::SigSet;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinSet, spawn_blocking};

use hexz_nbd::audit::{Event, Reload, ReloadFailed, Text};
use hexz_nbd::config::Config;
use hexz_nbd::exports::Catalog;
use hexz_nbd::gateway::tls::{self, ServerTls, TlsFiles, TlsVersion};
use hexz_nbd::gateway::{Control, Policy};
use hexz_nbd::snapshot::OpenOptions;
use hexz_nbd::storage::FileStamp;

use crate::cli::{Access, Serve, Snapshots};
use crate::opening;
use crate::record::Record;
use crate::service::Service;
use crate::start::{self, Failure};

/// How often files are looked at, if they are.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// With which keys and digests archives are to be opened, if with any.
type Trust = Option<OpenOptions>;

/// How often they are looked at until nothing more happens to them. Who goes on writing for
/// longer doesn't keep from us what has been written.
const MAX_LOOKS: u32 = 5;

/// What files were like, those that there were.
pub(crate) type Stamps = Vec<Option<FileStamp>>;

/// Keeps SIGHUP for later: until it is known what to do with it, it would end the program,
/// and starting can take as long as hashing an archive. Threads do as the one that starts
/// them, so this is for the only one.
pub(crate) fn hold_hangups() -> io::Result<()> {
    Ok(hangups().thread_block()?)
}

/// Hangups from now on, and the one that has been held. Call it on the thread that holds it.
pub(crate) fn hangup() -> io::Result<Signal> {
    let signal = signal(SignalKind::hangup())?;
    hangups().thread_unblock()?;
    Ok(signal)
}

fn hangups() -> SigSet {
    SigSet::from(nix::sys::signal::Signal::SIGHUP)
}

/// The files that say who may come in.
#[derive(Debug, Clone)]
pub(crate) struct PolicyFiles {
    tls: Option<(TlsFiles, TlsVersion)>,
    access: Access,
    snapshots: Snapshots,
}

impl PolicyFiles {
    pub(crate) fn new(options: &Serve) -> Self {
        Self {
            tls: options.tls.files(),
            access: options.network.access.clone(),
            snapshots: options.snapshots.clone(),
        }
    }

    /// Reads all of them, and checks that they fit each other. A key that can't be read again
    /// stays what it was `before`.
    pub(crate) fn read(
        &self,
        config: &Config,
        before: Option<&ServerTls>,
    ) -> Result<Policy, Failure> {
        let rules = self.access.rules()?;
        config.check(&rules, self.tls.is_some())?;
        let tls = match &self.tls {
            Some((files, oldest)) => {
                let (tls, warnings) = tls::load(files, *oldest, before)?;
                for warning in warnings {
                    tracing::warn!("{warning}");
                }
                Some(tls)
            }
            None => None,
        };
        let asks = tls.as_ref().is_some_and(ServerTls::asks_for_certificates);
        if rules.ask_for_identity() && !asks {
            return Err(Failure::IdentityWithoutCa);
        }
        Ok(Policy { rules, tls })
    }

    /// How archives are to be opened from now on, if keys or digests say which of them may.
    fn trust(&self) -> Result<Trust, Failure> {
        let opening = &self.snapshots.opening;
        if opening.verify_key.is_empty() && opening.digest.is_empty() {
            return Ok(None);
        }
        Ok(Some(opening::trust(opening)?))
    }

    /// Reads them once more.
    fn read_again(&self, config: &Config, before: Option<&ServerTls>) -> Result<Policy, Failure> {
        // Opening a pipe waits for a writer, who may never come.
        let is_pipe =
            |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
        match self.paths().into_iter().find(is_pipe) {
            Some(pipe) => Err(Failure::Pipe(pipe)),
            None => self.read(config, before),
        }
    }

    fn paths(&self) -> Vec<PathBuf> {
        let tls = self.tls.iter().flat_map(|(files, _)| files.paths());
        let trust = opening::files(&self.snapshots.opening);
        tls.chain(self.access.file()).cloned().chain(trust).collect()
    }

    /// What the files are like just now.
    pub(crate) fn look(&self) -> Stamps {
        self.paths().iter().map(|path| FileStamp::of(path)).collect()
    }

    /// The same, for those who must not wait for a file system.
    async fn stamps(&self) -> Stamps {
        let files = self.clone();
        spawn_blocking(move || files.look()).await.unwrap_or_default()
    }
}

/// Reads files anew when it is told to, or when they have changed.
pub(crate) struct Reloading {
    pub(crate) files: PolicyFiles,
    pub(crate) config: Config,
    pub(crate) control: Control<Catalog>,
    /// Who has to know.
    pub(crate) service: Arc<Service>,
    /// What the files were like before they were read.
    pub(crate) seen: Stamps,
    /// Whether only loopback is listened on, since nobody else could come in.
    pub(crate) on_loopback: bool,
    /// What they made of TLS.
    pub(crate) tls: Option<ServerTls>,
    /// Whose file is opened anew.
    pub(crate) record: Record,
}

impl Reloading {
    /// Reads anew at each signal, and, if files are watched, when they have changed.
    pub(crate) async fn on_signal(mut self, mut hangup: Signal, watch: bool) {
        let mut seen = std::mem::take(&mut self.seen);
        // Who was revoked must not stay for as long as it takes to hash an archive, or for
        // ever if one can't be opened; nor must the next signal wait for that.
        let mut archives = JoinSet::new();
        loop {
            tokio::select! {
                received = hangup.recv() => {
                    if received.is_none() {
                        return;
                    }
                    self.record.reopen();
                }
                () = self.changed(&seen), if watch => {}
            }
            self.service.reloading().await;
            seen = self.files.stamps().await;
            let reloaded = self.reload().await;
            let (to, trust) = reloaded.unzip();
            self.service.reloaded(to).await;
            if let Some(trust) = trust {
                archives.abort_all();
                while archives.try_join_next().is_some() {}
                let (control, snapshots) = (self.control.clone(), self.files.snapshots.clone());
                archives.spawn(look_at_archives(
                    control,
                    trust,
                    snapshots,
                    Arc::clone(&self.service),
                ));
            }
        }
    }

    /// Waits until the files aren't any more what they were, and then until nothing more
    /// happens to them: they come one after another, and have to fit each other.
    async fn changed(&self, seen: &[Option<FileStamp>]) {
        let mut last = seen.to_vec();
        let mut looks = 0;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.files.stamps().await;
            looks = if now == seen { 0 } else { looks + 1 };
            if (now == last && now != seen) || looks >= MAX_LOOKS {
                return;
            }
            last = now;
        }
    }

    /// Puts another policy in force, and says to whom it is open, and how archives are to be
    /// opened from now on.
    async fn reload(&mut self) -> Option<(String, Trust)> {
        let (files, config, before) = (self.files.clone(), self.config.clone(), self.tls.clone());
        let read =
            move || Ok::<_, Failure>((files.read_again(&config, before.as_ref())?, files.trust()?));
        let read = spawn_blocking(read).await;
        let (policy, trust) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => return self.keep(&error),
            Err(error) => return self.keep(&error),
        };
        self.tls.clone_from(&policy.tls);
        if self.on_loopback && !policy.rules.is_local_only() {
            tracing::warn!(
                "others may connect now, but only loopback is listened on since the start: give \
                 --listen, or start anew",
            );
        }
        let (open_to, to) = (policy.rules.to_string(), start::to_whom(&policy));
        let dropped = self.control.replace(policy);
        tracing::info!(dropped, "reloaded: open to {open_to}");
        let policy = self.control.policy();
        let open_to = open_to.into();
        self.config.audit.tell(|| Event::Reload(Reload { policy, open_to, dropped }));
        Some((to, trust))
    }

    fn keep<T>(&self, error: &dyn std::fmt::Display) -> Option<T> {
        tracing::error!("not reloaded, everything stays as it was: {error}");
        self.config.audit.tell(|| Event::ReloadFailed(ReloadFailed { why: Text::of(error) }));
        None
    }
}

/// Opens archives that have been replaced, so that what is wrong with them is said now and
/// not to the next client alone. If keys or digests say which may be opened, all are judged
/// by these; as long as none of them can be opened, those that were served are.
async fn look_at_archives(
    control: Control<Catalog>,
    trust: Trust,
    snapshots: Snapshots,
    service: Arc<Service>,
) {
    let (catalog, and_so) = match trust {
        Some(trust) => {
            (Arc::new(control.exports().trusting(trust)), ", so keys and digests stay as they were")
        }
        None => (control.exports(), ""),
    };
    match start::open(&catalog, &snapshots).await {
        Ok(exports) => {
            control.serve(catalog);
            tracing::info!("served: {exports}");
            service.serves(exports);
        }
        Err(error) => tracing::error!("an archive can't be served{and_so}: {error}"),
    }
}
