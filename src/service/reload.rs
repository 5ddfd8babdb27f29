//! Reloads the policy and the exports while sessions continue.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::SigSet;
use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};

use hexz_exports::Catalog;
use hexz_reader::OpenOptions;
#[cfg(feature = "remote")]
use hexz_reader::RemoteArchives;
use nbd_gateway::audit::{BoundedText, Event, PolicyReloaded, ReloadFailed};
use nbd_gateway::config::Config;
use nbd_gateway::tls::ServerTls;
use nbd_gateway::{Control, Policy};
use nbd_sandbox::{ReadableSet, SandboxPlan};
use nbd_telemetry::escape;

use super::audit::AuditHandle;
use super::changes::ActiveSettings;
use super::control::{Activation, ReloadReply, Requester, WaitingRequesters};
use super::notify::Notifier;
#[cfg(feature = "remote")]
use super::remote;
use super::watch::WatchedFiles;
use super::{access, archives, password, sandbox};
use crate::cli::{OpenArchiveOptions, SnapshotOptions};
use crate::exit_status::{self, ExitStatus, Failure};
use crate::settings::{FixedOptions, MergedOptions, OptionSource};

/// Blocks SIGHUP until its handler is installed. It would end the program otherwise, and the
/// startup can take as long as hashing an archive. Threads inherit the signal mask, so this must
/// be called while there is only one.
pub(super) fn block_sighup() -> io::Result<()> {
    Ok(sighup_set().thread_block()?)
}

/// Returns the stream of SIGHUP signals, including a pending one that was blocked. Must be called
/// on the thread that blocks it.
pub(super) fn unblock_sighup() -> io::Result<Signal> {
    let signal = signal(SignalKind::hangup())?;
    sighup_set().thread_unblock()?;
    Ok(signal)
}

fn sighup_set() -> SigSet {
    SigSet::from(nix::sys::signal::Signal::SIGHUP)
}

/// Change that can't be made at run time.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("{} is a pipe, which can be read only once", escape::path(.0))]
    Pipe(PathBuf),
    #[error("TLS can't be turned on or off at run time: restart")]
    TlsToggled,
    #[error("{} not readable inside the sandbox: restart", with_verb(.0))]
    OutsideSandbox(Vec<PathBuf>),
}

impl ExitStatus for ReloadError {
    fn exit_status(&self) -> u8 {
        exit_status::USAGE
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Pipe(_) => "pipe",
            Self::TlsToggled => "tls_toggled",
            Self::OutsideSandbox(_) => "outside_sandbox",
        }
    }
}

/// Returns "a is" or "a, b are".
fn with_verb(paths: &[PathBuf]) -> String {
    let all: Vec<String> = paths.iter().map(|path| escape::path(path).to_string()).collect();
    format!("{} {}", all.join(", "), if all.len() == 1 { "is" } else { "are" })
}

/// Reloads the files on a signal, on a request, or when they have changed.
#[derive(Debug)]
pub(super) struct Reloader {
    pub(super) inputs: Arc<ReloadInputs>,
    /// Stamps of the files from before they were read.
    pub(super) files: WatchedFiles,
    /// Active settings.
    pub(super) active: ActiveSettings,
    /// Clients of the control socket.
    pub(super) requests: mpsc::Receiver<Requester>,
    pub(super) served: ServedExports,
    /// True if the gateway listens on loopback only, since the rules admitted no other clients at
    /// startup.
    pub(super) is_loopback_only: bool,
    pub(super) notifier: Arc<Notifier>,
    /// Audit whose file is reopened.
    pub(super) audit: AuditHandle,
}

/// Inputs of a reload that stay the same while the program runs.
#[derive(Debug)]
pub(super) struct ReloadInputs {
    pub(super) source: OptionSource,
    /// Path of the configuration file, if there is one.
    pub(super) file: Option<PathBuf>,
    /// Options that can't change while the program runs.
    pub(super) fixed: FixedOptions,
    pub(super) config: Config,
    pub(super) readable: ReadableSet,
    /// Source of remote archives.
    #[cfg(feature = "remote")]
    pub(super) stores: Option<Arc<RemoteArchives>>,
}

/// Outcome of reading everything again.
struct ReloadPlan {
    settings: ActiveSettings,
    policy: Policy,
    catalog: Catalog,
    /// Consequence if the archives can't be opened; part of the error message.
    consequence: &'static str,
    /// Options that have changed in the file, but only take effect after a restart.
    needs_restart: Vec<String>,
}

/// Result of activating a new policy.
struct Activated<F> {
    activation: Activation,
    /// Description of how, and to which clients, exports are served.
    access: String,
    /// Opens the archives.
    opening: F,
}

impl Reloader {
    /// Reloads on each signal and request, and, if `watch` is set, when files have changed.
    pub(super) async fn run(mut self, mut sighup: Signal, watch: bool) {
        // Archives are opened in the background. A revoked client must not stay for as long as it
        // takes to hash an archive, or forever if one can't be opened; nor must the next signal
        // wait for that.
        let mut archives: JoinSet<()> = JoinSet::new();
        let waiting = WaitingRequesters::default();
        loop {
            let mut requesters = Vec::new();
            tokio::select! {
                received = sighup.recv() => {
                    if received.is_none() {
                        return;
                    }
                    self.audit.reopen();
                }
                Some(requester) = self.requests.recv() => {
                    requesters.push(requester);
                    // This reload is theirs, too.
                    requesters.extend(std::iter::from_fn(|| self.requests.try_recv().ok()));
                    self.audit.reopen();
                }
                () = self.files.changed(), if watch => {}
            }
            self.notifier.reloading().await;
            self.files = self.files.current().await;
            match self.read().await {
                Ok(plan) => {
                    let Activated { activation, access, opening } =
                        self.activate(plan, waiting.clone());
                    self.notifier.reloaded(Some(access)).await;
                    for requester in &requesters {
                        requester.reply(ReloadReply::Activated(activation.clone()));
                    }
                    // What is being opened for an earlier reload must not end the wait of these.
                    archives.shutdown().await;
                    waiting.extend(requesters);
                    archives.spawn(opening);
                }
                Err(error) => {
                    let reply = self.report_failure(&error);
                    self.notifier.reloaded(None).await;
                    requesters.iter().for_each(|requester| requester.reply(reply.clone()));
                }
            }
        }
    }

    /// Reads everything again on a thread that may block.
    async fn read(&mut self) -> Result<ReloadPlan, Failure> {
        let (inputs, tls) = (Arc::clone(&self.inputs), self.active.tls.clone());
        let served = self.served.current();
        let read = spawn_blocking(move || {
            let mut files = None;
            (inputs.read(tls.as_ref(), served, &mut files), files)
        });
        let (plan, files) = read.await.map_err(io::Error::other)?;
        // Also after a failure: the fix may be in a file that wasn't watched before.
        if let Some(files) = files {
            self.files = files;
        }
        plan
    }

    /// Activates a new policy. The result of opening the archives goes to `waiting`.
    fn activate(
        &mut self,
        plan: ReloadPlan,
        waiting: WaitingRequesters,
    ) -> Activated<impl Future<Output = ()> + Send + use<>> {
        let ReloadPlan { settings, policy, catalog, consequence, needs_restart } = plan;
        if !needs_restart.is_empty() {
            let options = needs_restart.join(", ");
            tracing::warn!(reason = "needs_restart", "changes that need a restart: {options}");
        }
        if self.is_loopback_only && !policy.rules.is_local_only() {
            tracing::warn!(
                reason = "loopback_only",
                "the rules admit other machines now, but the program listens on loopback only: \
                 restart, or use --listen"
            );
        }
        let changes = settings.changes_since(&self.active);
        match changes.as_slice() {
            [] => tracing::info!("reload: no option and no file has changed"),
            changes => tracing::info!("reload: {}", changes.join("; ")),
        }
        let labels = settings.labels_since(&self.active);
        let (open_to, access) = (policy.rules.to_string(), access::describe_access(&policy));
        let snapshots = settings.options.snapshots.clone();
        self.active = settings;
        let (dropped, number) = self.served.activate_policy(policy, &snapshots);
        tracing::info!(dropped, changed = labels, "reloaded: open to {open_to}");
        let event = PolicyReloaded { policy: number, open_to: open_to.as_str().into(), dropped };
        self.inputs.config.audit.emit(|| Event::Reload(event));
        let activation = Activation { open_to, dropped, changes, needs_restart };

        let (served, notifier) = (self.served.clone(), Arc::clone(&self.notifier));
        // Opens archives that are new or have been replaced, so that problems are logged now and
        // not only when a client asks for them. The old exports are served until all of this has
        // succeeded.
        let opening = async move {
            let catalog = Arc::new(catalog);
            match archives::open(&catalog, &snapshots).await {
                Ok(exports) => {
                    if served.replace(number, catalog, snapshots) {
                        tracing::info!("now serving {exports}");
                        notifier.set_exports(exports.clone());
                        waiting.finish(&ReloadReply::Served { exports });
                    }
                }
                Err(error) => {
                    let message = format!("archives not reloaded{consequence}: {error}");
                    tracing::error!(
                        reason = "archives_not_reloaded",
                        cause = error.label(),
                        hint = error.hint(),
                        "{message}"
                    );
                    waiting.finish(&ReloadReply::failed(&error, message));
                }
            }
        };
        Activated { activation, access, opening }
    }

    /// Logs that a reload failed, and returns the reply for those who asked for it.
    fn report_failure(&self, error: &Failure) -> ReloadReply {
        let message = format!("reload failed, keeping the previous settings: {error}");
        tracing::error!(
            reason = "reload_failed",
            cause = error.label(),
            hint = error.hint(),
            "{message}"
        );
        self.served.control.record_failed_reload(&error.to_string());
        let event = ReloadFailed { why: BoundedText::from_display(error) };
        self.inputs.config.audit.emit(|| Event::ReloadFailed(event));
        ReloadReply::failed(error, message)
    }
}

impl ReloadInputs {
    /// Reads everything, and checks that it is consistent and can be applied at run time. Sets
    /// `files` to the stamps from before the files were read, as soon as it is known which files
    /// these are.
    fn read(
        &self,
        tls: Option<&ServerTls>,
        (exports, before): (Arc<Catalog>, SnapshotOptions),
        files: &mut Option<WatchedFiles>,
    ) -> Result<ReloadPlan, Failure> {
        // Opening a pipe waits for a writer, which may never come.
        reject_pipes(&self.file)?;
        let MergedOptions { serve, stamp, fixed, .. } = self.source.reread()?;
        let options = serve.changeable;
        let watched = WatchedFiles::new(self.file.as_deref(), stamp, &options);
        *files = Some(watched.clone());
        // Existing connections could continue unencrypted after TLS has been required.
        if options.tls.files().is_some() != tls.is_some() {
            return Err(ReloadError::TlsToggled.into());
        }
        let needed = sandbox::add_files(SandboxPlan::default(), &options);
        let unreadable = self.readable.unreadable(&needed);
        if !unreadable.is_empty() {
            return Err(ReloadError::OutsideSandbox(unreadable).into());
        }
        reject_pipes(&sandbox::policy_files(&options))?;
        let policy = access::read(&options, &self.config, tls)?;
        #[cfg(feature = "remote")]
        if let Some(stores) = &self.stores {
            remote::set_queries(stores, &serve.stores.secret_urls)?;
        }
        let snapshots = &options.snapshots;
        // Archives that are already open stay open, unless all must be reopened.
        let mut catalog = exports.with_selection(snapshots.choice())?;
        if let Some(options) =
            reopen_options(exports.options(), &before.opening, &snapshots.opening)?
        {
            catalog = catalog.reopened_with(options);
        }
        let consequence = if *snapshots != before {
            ", keeping the previous exports for clients that both the previous and the new rules \
             allow to open them"
        } else if archives::has_keys_or_digests(&snapshots.opening) {
            ", keeping the previous keys and digests"
        } else {
            ""
        };
        let needs_restart = self.fixed.changed_keys(&fixed).into_iter().map(str::to_owned);
        let needs_restart = needs_restart.collect();
        let settings = ActiveSettings::new(options, &policy, watched);
        Ok(ReloadPlan { settings, policy, catalog, consequence, needs_restart })
    }
}

/// Returns the options with which all archives must be reopened; `None` if they needn't be. They
/// must be if there are keys or digests, which may have changed in their files.
fn reopen_options(
    now: &OpenOptions,
    before: &OpenArchiveOptions,
    wanted: &OpenArchiveOptions,
) -> Result<Option<OpenOptions>, Failure> {
    if before == wanted && !archives::has_keys_or_digests(wanted) {
        return Ok(None);
    }
    // It is read from its source when needed; under `--user` it can't be read here.
    let password = if before.password_file == wanted.password_file {
        now.password.clone()
    } else {
        reject_pipes(&wanted.password_file)?;
        password::password_source(wanted.password_file.as_deref())?
    };
    Ok(Some(archives::with_password(wanted, password)?))
}

fn reject_pipes<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), ReloadError> {
    let is_pipe =
        |path: &Path| std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
    match paths.into_iter().find(|path| is_pipe(path)) {
        Some(pipe) => Err(ReloadError::Pipe(pipe.clone())),
        None => Ok(()),
    }
}

/// The served exports, and the options from which they were built. These lag behind the current
/// options while archives are being opened, and for as long as that fails.
#[derive(Debug, Clone)]
pub(super) struct ServedExports {
    control: Control<Catalog>,
    snapshots: Arc<Mutex<SnapshotOptions>>,
}

impl ServedExports {
    pub(super) fn new(control: Control<Catalog>, snapshots: SnapshotOptions) -> Self {
        Self { control, snapshots: Arc::new(Mutex::new(snapshots)) }
    }

    fn current(&self) -> (Arc<Catalog>, SnapshotOptions) {
        let snapshots = self.snapshots.lock();
        (self.control.exports(), snapshots.clone())
    }

    /// Activates a policy that belongs to exports built from `snapshots`. Returns the number of
    /// connections dropped, and the number of the policy.
    fn activate_policy(&self, policy: Policy, snapshots: &SnapshotOptions) -> (usize, u64) {
        let served = self.snapshots.lock();
        let dropped = if *served == *snapshots {
            self.control.replace_policy(policy)
        } else {
            self.control.replace_policy_before_exports(policy)
        };
        (dropped, self.control.policy_number())
    }

    /// Serves the exports that belong to the policy number `policy`, unless a newer policy is
    /// active. Returns true if they are served.
    fn replace(&self, policy: u64, catalog: Arc<Catalog>, snapshots: SnapshotOptions) -> bool {
        let mut served = self.snapshots.lock();
        let is_wanted = self.control.policy_number() == policy;
        if is_wanted {
            self.control.replace_exports(catalog);
            *served = snapshots;
        }
        is_wanted
    }
}
