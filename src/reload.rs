//! Reading anew who may come in, while those who are in go on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;

use hexz_nbd::config::Config;
use hexz_nbd::exports::Catalog;
use hexz_nbd::gateway::tls::{self, TlsFiles, TlsVersion};
use hexz_nbd::gateway::{Control, Policy};
use hexz_nbd::snapshot::OpenOptions;
use hexz_nbd::storage::FileStamp;

use crate::cli::{Access, Serve, Snapshots};
use crate::opening;
use crate::start::{self, Failure};

/// How often files are looked at, if they are.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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

    /// Reads all of them, and checks that they fit each other.
    pub(crate) fn read(&self, config: &Config) -> Result<Policy, Failure> {
        let rules = self.access.rules()?;
        config.check(&rules, self.tls.is_some())?;
        let tls = match &self.tls {
            Some((files, oldest)) => {
                let (tls, warnings) = tls::load(files, *oldest)?;
                for warning in warnings {
                    tracing::warn!("{warning}");
                }
                Some(tls)
            }
            None => None,
        };
        let asks = tls.as_ref().is_some_and(tls::ServerTls::asks_for_certificates);
        if rules.ask_for_identity() && !asks {
            return Err(Failure::IdentityWithoutCa);
        }
        Ok(Policy { rules, tls })
    }

    /// How archives are to be opened from now on, if keys or digests say which of them may.
    fn trust(&self) -> Result<Option<OpenOptions>, Failure> {
        let opening = &self.snapshots.opening;
        if opening.verify_key.is_empty() && opening.digest.is_empty() {
            return Ok(None);
        }
        opening::options(opening).map(Some)
    }

    fn paths(&self) -> Vec<PathBuf> {
        let tls = self.tls.iter().flat_map(|(files, _)| files.paths());
        let trust = opening::files(&self.snapshots.opening);
        tls.chain(self.access.file()).cloned().chain(trust).collect()
    }

    /// What the files are like just now.
    async fn stamps(&self) -> Vec<Option<FileStamp>> {
        let paths = self.paths();
        let look = move || paths.iter().map(|path| FileStamp::of(path)).collect();
        spawn_blocking(look).await.unwrap_or_default()
    }
}

/// Reads files anew when it is told to, or when they have changed.
pub(crate) struct Reloading {
    pub(crate) files: PolicyFiles,
    pub(crate) config: Config,
    pub(crate) control: Control<Catalog>,
}

impl Reloading {
    /// Reads anew at each signal, and, if files are watched, when they have changed.
    pub(crate) async fn on_signal(self, mut hangup: Signal, watch: bool) {
        let mut seen = self.files.stamps().await;
        loop {
            tokio::select! {
                received = hangup.recv() => if received.is_none() { return },
                () = self.changed(&seen), if watch => {}
            }
            seen = self.files.stamps().await;
            self.reload().await;
        }
    }

    /// Waits until the files aren't any more what they were, and then until nothing more
    /// happens to them: they come one after another, and have to fit each other.
    async fn changed(&self, seen: &[Option<FileStamp>]) {
        let mut last = seen.to_vec();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.files.stamps().await;
            if now == last && now != seen {
                return;
            }
            last = now;
        }
    }

    async fn reload(&self) {
        let (files, config) = (self.files.clone(), self.config.clone());
        let read = move || Ok::<_, Failure>((files.read(&config)?, files.trust()?));
        let read = spawn_blocking(read).await;
        let (policy, trust) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => return keep(&error),
            Err(error) => return keep(&error),
        };
        let mut catalog = self.control.exports();
        if let Some(trust) = trust {
            catalog = Arc::new(catalog.opened_by(trust));
        }
        // Archives that have been replaced are opened now, so that what is wrong with them
        // is said now and not to the next client alone.
        let exports = match start::open(&catalog, &self.files.snapshots).await {
            Ok(exports) => exports,
            Err(error) => return keep(&error),
        };
        let to = policy.rules.to_string();
        let dropped = self.control.replace(policy, catalog);
        tracing::info!(dropped, "reloaded: serving {exports} to {to}");
    }
}

fn keep(error: &dyn std::fmt::Display) {
    tracing::error!("not reloaded, everything stays as it was: {error}");
}
