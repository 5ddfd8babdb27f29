//! Reloads the policy and the exports while sessions continue.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::SigSet;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinSet, spawn_blocking};

use hexz_exports::Catalog;
use hexz_reader::OpenOptions;
use hexz_reader::storage::FileStamp;
use nbd_gateway::audit::{BoundedText, Event, PolicyReloaded, ReloadFailed};
use nbd_gateway::config::Config;
use nbd_gateway::tls::ServerTls;
use nbd_gateway::{Control, Policy};
use nbd_sandbox::{ReadableSet, SandboxPlan};
use nbd_telemetry::escape;

use super::{access, archives, password, sandbox};
use crate::cli::{OpenArchiveOptions, ReloadableOptions, SnapshotOptions};
use crate::exit_status::{self, ExitStatus, Failure};
use crate::service::audit::AuditHandle;
use crate::service::notify::Notifier;
use crate::settings::{FixedOptions, OptionSource, ReloadedOptions};

/// Interval at which watched files are polled.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of polls after a change before the files are read. A writer that doesn't stop
/// can't delay the reload for longer.
const MAX_SETTLE_POLLS: u32 = 5;

/// Blocks SIGHUP until its handler is installed. It would end the program otherwise, and the
/// startup can take as long as hashing an archive. Threads inherit the signal mask, so this must
/// be called while there is only one.
pub(crate) fn block_sighup() -> io::Result<()> {
    Ok(sighup_set().thread_block()?)
}

/// Returns the stream of SIGHUP signals, including a pending one that was blocked. Must be called
/// on the thread that blocks it.
pub(crate) fn unblock_sighup() -> io::Result<Signal> {
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
    #[error("{} is a pipe, which can be read only once", escape::name(.0))]
    Pipe(PathBuf),
    #[error("TLS can't be switched on or off while clients are served; it takes a restart")]
    TlsToggled,
    #[error(
        "{} outside what the sandbox lets this program read; it takes a restart",
        with_verb(.0)
    )]
    OutsideSandbox(Vec<PathBuf>),
}

impl ExitStatus for ReloadError {
    fn exit_status(&self) -> u8 {
        exit_status::USAGE
    }
}

/// Returns "a is" or "a, b are".
fn with_verb(paths: &[PathBuf]) -> String {
    let all: Vec<String> = paths.iter().map(|path| escape::name(path).to_string()).collect();
    format!("{} {}", all.join(", "), if all.len() == 1 { "is" } else { "are" })
}

/// Stamps of the files that a reload reads; `None` for files that don't exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FileStamps {
    config: Option<FileStamp>,
    others: Vec<(PathBuf, Option<FileStamp>)>,
}

impl FileStamps {
    /// Takes the stamps of the files that `options` name. The stamp of the configuration file
    /// must have been taken before it was read.
    pub(crate) fn of(config: Option<FileStamp>, options: &ReloadableOptions) -> Self {
        Self::with(config, sandbox::policy_files(options).into_iter())
    }

    /// Takes the stamps of the same files again; `config` is the configuration file.
    fn retake(self, config: Option<&Path>) -> Self {
        let config = config.and_then(FileStamp::of);
        Self::with(config, self.others.into_iter().map(|(path, _)| path))
    }

    fn with(config: Option<FileStamp>, others: impl Iterator<Item = PathBuf>) -> Self {
        let others = others.map(|path| {
            let stamp = FileStamp::of(&path);
            (path, stamp)
        });
        Self { config, others: others.collect() }
    }
}

/// State for reloading the files on a signal, or when they have changed.
#[derive(Debug)]
pub(crate) struct Reloader {
    pub(crate) source: OptionSource,
    /// Path of the configuration file, if there is one.
    pub(crate) file: Option<PathBuf>,
    /// Options that can't change while the program runs.
    pub(crate) fixed_options: FixedOptions,
    pub(crate) config: Config,
    pub(crate) readable: ReadableSet,
    pub(crate) control: Control<Catalog>,
    /// Service manager to notify.
    pub(crate) service: Arc<Notifier>,
    /// Stamps of the files from before they were read.
    pub(crate) stamps: FileStamps,
    /// True if the gateway listens on loopback only, since the rules admitted no other clients at
    /// startup.
    pub(crate) is_loopback_only: bool,
    pub(crate) active: ActiveState,
    /// Audit whose file is reopened.
    pub(crate) record: AuditHandle,
}

/// TLS settings and exports that are active.
#[derive(Debug, Clone)]
pub(crate) struct ActiveState {
    pub(crate) tls: Option<ServerTls>,
    pub(crate) served: ServedExports,
}

/// Options from which the served exports were built. They lag behind the current options while
/// archives are being opened, and for as long as that fails.
#[derive(Debug, Clone)]
pub(crate) struct ServedExports(Arc<Mutex<ServedState>>);

#[derive(Debug)]
struct ServedState {
    snapshots: SnapshotOptions,
    /// Number of policies that have been activated since startup.
    policy_count: u64,
}

impl ServedExports {
    pub(crate) fn new(snapshots: SnapshotOptions) -> Self {
        Self(Arc::new(Mutex::new(ServedState { snapshots, policy_count: 0 })))
    }

    /// Returns the served catalog, and the options from which it was built.
    fn current(&self, control: &Control<Catalog>) -> (Arc<Catalog>, SnapshotOptions) {
        let state = self.lock();
        (control.exports(), state.snapshots.clone())
    }

    /// Activates a policy that belongs to exports built from `snapshots`. Returns the number of
    /// connections dropped, and the number of the policy.
    fn activate_policy(
        &self,
        control: &Control<Catalog>,
        policy: Policy,
        snapshots: &SnapshotOptions,
    ) -> (usize, u64) {
        let mut state = self.lock();
        state.policy_count += 1;
        let dropped = if state.snapshots == *snapshots {
            control.replace_policy(policy)
        } else {
            control.replace_policy_before_exports(policy)
        };
        (dropped, state.policy_count)
    }

    /// Serves the exports that belong to the policy number `policy`, unless a newer policy is
    /// active. Returns true if they are served.
    fn replace(
        &self,
        control: &Control<Catalog>,
        policy: u64,
        catalog: Arc<Catalog>,
        snapshots: SnapshotOptions,
    ) -> bool {
        let mut state = self.lock();
        let is_wanted = state.policy_count == policy;
        if is_wanted {
            control.replace_exports(catalog);
            state.snapshots = snapshots;
        }
        is_wanted
    }

    fn lock(&self) -> MutexGuard<'_, ServedState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Outcome of reading everything again.
struct ReloadPlan {
    snapshots: SnapshotOptions,
    policy: Policy,
    catalog: Catalog,
    /// Consequence for the other archives if one can't be served; part of the error message.
    consequence: &'static str,
    /// Options that have changed in the file, but only take effect after a restart.
    needs_restart: Vec<String>,
}

impl Reloader {
    /// Reloads on each signal, and, if `watch` is set, when files have changed.
    pub(crate) async fn run(mut self, mut sighup: Signal, watch: bool) {
        // Archives are opened in the background. A revoked client must not stay for as long as it
        // takes to hash an archive, or forever if one can't be opened; nor must the next signal
        // wait for that.
        let mut archives: JoinSet<()> = JoinSet::new();
        loop {
            tokio::select! {
                received = sighup.recv() => {
                    if received.is_none() {
                        return;
                    }
                    self.record.reopen();
                }
                () = self.wait_for_change(), if watch => {}
            }
            self.service.reloading().await;
            self.stamps = self.stamps().await;
            let reloaded = self.reload().await;
            let (to, open_archives) = reloaded.unzip();
            self.service.reloaded(to).await;
            if let Some(open_archives) = open_archives {
                archives.shutdown().await;
                archives.spawn(open_archives);
            }
        }
    }

    /// Waits until the files have changed, and then until they stop changing: related files are
    /// replaced one after another, and must match.
    async fn wait_for_change(&self) {
        let mut last = self.stamps.clone();
        let mut polls = 0;
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let now = self.stamps().await;
            polls = if now == self.stamps { 0 } else { polls + 1 };
            if (now == last && now != self.stamps) || polls >= MAX_SETTLE_POLLS {
                return;
            }
            last = now;
        }
    }

    /// Takes the current stamps of the files, without blocking the runtime.
    async fn stamps(&self) -> FileStamps {
        let (file, stamps) = (self.file.clone(), self.stamps.clone());
        spawn_blocking(move || stamps.retake(file.as_deref())).await.unwrap_or_default()
    }

    /// Activates a new policy. Returns a description of the clients that it admits, and a future
    /// that opens the archives. `None` if the reload failed.
    async fn reload(&mut self) -> Option<(String, impl Future<Output = ()> + Send + use<>)> {
        let reading = ReloadInputs {
            source: self.source.clone(),
            file: self.file.clone(),
            fixed: self.fixed_options.clone(),
            config: self.config.clone(),
            readable: self.readable.clone(),
            tls: self.active.tls.clone(),
            served: self.active.served.current(&self.control),
        };
        let read = spawn_blocking(move || {
            let mut stamps = None;
            (reading.read(&mut stamps), stamps)
        });
        let (read, stamps) = match read.await {
            Ok(read) => read,
            Err(error) => return self.reject(&error),
        };
        // Also after a failure: the fix may be in a file that wasn't watched before.
        if let Some(stamps) = stamps {
            self.stamps = stamps;
        }
        let read = match read {
            Ok(read) => read,
            Err(error) => return self.reject(&error),
        };
        let ReloadPlan { snapshots, policy, catalog, consequence, needs_restart } = read;
        if !needs_restart.is_empty() {
            tracing::warn!("takes a restart: {}", needs_restart.join(", "));
        }
        if self.is_loopback_only && !policy.rules.is_local_only() {
            tracing::warn!(
                "others may connect now, but only loopback is listened on since the start: give \
                 --listen, or start anew",
            );
        }
        self.active.tls.clone_from(&policy.tls);
        let (open_to, to) = (policy.rules.to_string(), access::describe_access(&policy));
        let served = &self.active.served;
        let (dropped, policy_number) = served.activate_policy(&self.control, policy, &snapshots);
        tracing::info!(dropped, "reloaded: open to {open_to}");
        let policy = self.control.policy_number();
        let open_to = open_to.into();
        self.config.audit.emit(|| Event::Reload(PolicyReloaded { policy, open_to, dropped }));
        let open_archives = OpenArchives {
            control: self.control.clone(),
            served: self.active.served.clone(),
            policy_number,
            service: Arc::clone(&self.service),
            catalog,
            snapshots,
            consequence,
        };
        Some((to, open_archives.run()))
    }

    fn reject<T>(&self, error: &dyn std::fmt::Display) -> Option<T> {
        tracing::error!("not reloaded, everything stays as it was: {error}");
        self.control.record_failed_reload(&error.to_string());
        self.config
            .audit
            .emit(|| Event::ReloadFailed(ReloadFailed { why: BoundedText::from_display(error) }));
        None
    }
}

/// Inputs for reading everything again on a blocking thread.
struct ReloadInputs {
    source: OptionSource,
    file: Option<PathBuf>,
    fixed: FixedOptions,
    config: Config,
    readable: ReadableSet,
    tls: Option<ServerTls>,
    served: (Arc<Catalog>, SnapshotOptions),
}

impl ReloadInputs {
    /// Reads everything, and checks that it is consistent and can be applied at run time. Sets
    /// `seen` to the stamps from before the files were read, as soon as it is known which files
    /// these are.
    fn read(&self, stamps: &mut Option<FileStamps>) -> Result<ReloadPlan, Failure> {
        // Opening a pipe waits for a writer, which may never come.
        reject_pipes(&self.file)?;
        let ReloadedOptions { options, stamp, fixed } = self.source.reread()?;
        *stamps = Some(FileStamps::of(stamp, &options));
        let needs_restart = self.fixed.changed_keys(&fixed);
        let needs_restart = needs_restart.into_iter().map(str::to_owned).collect();
        // Existing connections could continue unencrypted after TLS has been required.
        if options.tls.files().is_some() != self.tls.is_some() {
            return Err(ReloadError::TlsToggled.into());
        }
        let closed =
            self.readable.unreadable(&sandbox::add_files(SandboxPlan::default(), &options));
        if !closed.is_empty() {
            return Err(ReloadError::OutsideSandbox(closed).into());
        }
        reject_pipes(&sandbox::policy_files(&options))?;
        let policy = access::read(&options, &self.config, self.tls.as_ref())?;
        let catalog = self.catalog(&options.snapshots)?;
        let consequence = match options.snapshots == self.served.1 {
            false => {
                ", so what is served stays as it was, for those who might open it before and \
                 still may"
            }
            true if archives::has_keys_or_digests(&options.snapshots.opening) => {
                ", so keys and digests stay as they were"
            }
            true => "",
        };
        Ok(ReloadPlan { snapshots: options.snapshots, policy, catalog, consequence, needs_restart })
    }

    /// Builds the new catalog. Archives that are already open stay open, unless all must be
    /// reopened.
    fn catalog(&self, wanted: &SnapshotOptions) -> Result<Catalog, Failure> {
        let (exports, before) = &self.served;
        let chosen = exports.with_selection(wanted.choice())?;
        Ok(match reopen_options(exports.options(), &before.opening, &wanted.opening)? {
            Some(options) => chosen.reopened_with(options),
            None => chosen,
        })
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

/// Work that remains after a new policy has been activated.
struct OpenArchives {
    control: Control<Catalog>,
    served: ServedExports,
    /// Number of the policy that it belongs to.
    policy_number: u64,
    service: Arc<Notifier>,
    catalog: Catalog,
    snapshots: SnapshotOptions,
    consequence: &'static str,
}

impl OpenArchives {
    /// Opens archives that are new or have been replaced, so that problems are logged now and not
    /// only when a client asks for them. The old exports are served until all of this has
    /// succeeded.
    async fn run(self) {
        let catalog = Arc::new(self.catalog);
        match archives::open(&catalog, &self.snapshots).await {
            Ok(exports) => {
                if self.served.replace(&self.control, self.policy_number, catalog, self.snapshots) {
                    tracing::info!("served: {exports}");
                    self.service.set_exports(exports);
                }
            }
            Err(error) => {
                let consequence = self.consequence;
                tracing::error!("an archive can't be served{consequence}: {error}");
            }
        }
    }
}
