//! Reading anew what is served and who may come in, while those who are in go on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::SigSet;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinSet, spawn_blocking};

use hexz_nbd::audit::{Event, Reload, ReloadFailed, Text};
use hexz_nbd::config::Config;
use hexz_nbd::exports::Catalog;
use hexz_nbd::gateway::tls::ServerTls;
use hexz_nbd::gateway::{Control, Policy};
use hexz_nbd::sandbox::{Confines, Plan};
use hexz_nbd::snapshot::OpenOptions;
use hexz_nbd::storage::FileStamp;

use crate::cli::{Changeable, Opening, Snapshots};
use crate::failure::Failure;
use crate::record::Record;
use crate::service::Service;
use crate::settings::{Again, Fixed, Source};
use crate::{opening, password, policy};

/// How often files are looked at, if they are.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often they are looked at until nothing more happens to them. Who goes on writing for
/// longer doesn't keep from us what has been written.
const MAX_LOOKS: u32 = 5;

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

/// What files were like, those that there were.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stamps {
    config: Option<FileStamp>,
    others: Vec<(PathBuf, Option<FileStamp>)>,
}

impl Stamps {
    /// Looks at the files that `options` name. What the configuration file was like before it
    /// was read has been seen by whoever read it.
    pub(crate) fn of(config: Option<FileStamp>, options: &Changeable) -> Self {
        Self::with(config, options.policy_files().into_iter())
    }

    /// Looks at the same files again; `config` is the configuration file.
    fn again(self, config: Option<&Path>) -> Self {
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

/// Reads files anew when it is told to, or when they have changed.
#[derive(Debug)]
pub(crate) struct Reloading {
    pub(crate) source: Source,
    /// The configuration file, if there is one.
    pub(crate) file: Option<PathBuf>,
    /// What can't be exchanged.
    pub(crate) fixed: Fixed,
    pub(crate) config: Config,
    pub(crate) confines: Confines,
    pub(crate) control: Control<Catalog>,
    /// Who has to know.
    pub(crate) service: Arc<Service>,
    /// What the files were like before they were read.
    pub(crate) seen: Stamps,
    /// Whether only loopback is listened on, since nobody else could come in.
    pub(crate) on_loopback: bool,
    pub(crate) in_force: InForce,
    /// Whose file is opened anew.
    pub(crate) record: Record,
}

/// What has been read last.
#[derive(Debug, Clone)]
pub(crate) struct InForce {
    pub(crate) tls: Option<ServerTls>,
    pub(crate) served: Served,
}

/// What the exports that are served were made of. It lags behind the options while archives are
/// opened, and for as long as they can't be.
#[derive(Debug, Clone)]
pub(crate) struct Served(Arc<Mutex<Made>>);

#[derive(Debug)]
struct Made {
    of: Snapshots,
    /// How many policies were put in force since the start.
    policies: u64,
}

impl Served {
    pub(crate) fn new(snapshots: Snapshots) -> Self {
        Self(Arc::new(Mutex::new(Made { of: snapshots, policies: 0 })))
    }

    /// What is served, and what that was made of.
    fn look(&self, control: &Control<Catalog>) -> (Arc<Catalog>, Snapshots) {
        let made = self.lock();
        (control.exports(), made.of.clone())
    }

    /// Puts a policy in force that is for what is made of these. Says how many connections
    /// were dropped, and which policy it is.
    fn judge(
        &self,
        control: &Control<Catalog>,
        policy: Policy,
        snapshots: &Snapshots,
    ) -> (usize, u64) {
        let mut made = self.lock();
        made.policies += 1;
        let dropped = if made.of == *snapshots {
            control.replace(policy)
        } else {
            control.replace_early(policy)
        };
        (dropped, made.policies)
    }

    /// Serves what was made for that policy, unless there is another one by now.
    fn replace(
        &self,
        control: &Control<Catalog>,
        policy: u64,
        catalog: Arc<Catalog>,
        snapshots: Snapshots,
    ) -> bool {
        let mut made = self.lock();
        let is_wanted = made.policies == policy;
        if is_wanted {
            control.serve(catalog);
            made.of = snapshots;
        }
        is_wanted
    }

    fn lock(&self) -> MutexGuard<'_, Made> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be in force from now on.
struct Renewed {
    snapshots: Snapshots,
    policy: Policy,
    catalog: Catalog,
    /// What follows for the others if an archive can't be served.
    and_so: &'static str,
    /// Options that the file has changed, but that only a restart can.
    takes_a_restart: Vec<String>,
}

impl Reloading {
    /// Reads anew at each signal, and, if files are watched, when they have changed.
    pub(crate) async fn on_signal(mut self, mut hangup: Signal, watch: bool) {
        // Who was revoked must not stay for as long as it takes to hash an archive, or for
        // ever if one can't be opened; nor must the next signal wait for that.
        let mut archives: JoinSet<()> = JoinSet::new();
        loop {
            tokio::select! {
                received = hangup.recv() => {
                    if received.is_none() {
                        return;
                    }
                    self.record.reopen();
                }
                () = self.changed(), if watch => {}
            }
            self.service.reloading().await;
            self.seen = self.stamps().await;
            let reloaded = self.reload().await;
            let (to, look) = reloaded.unzip();
            self.service.reloaded(to).await;
            if let Some(look) = look {
                archives.shutdown().await;
                archives.spawn(look);
            }
        }
    }

    /// Waits until the files aren't any more what they were, and then until nothing more
    /// happens to them: they come one after another, and have to fit each other.
    async fn changed(&self) {
        let mut last = self.seen.clone();
        let mut looks = 0;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.stamps().await;
            looks = if now == self.seen { 0 } else { looks + 1 };
            if (now == last && now != self.seen) || looks >= MAX_LOOKS {
                return;
            }
            last = now;
        }
    }

    /// What the files are like just now, for those who must not wait for a file system.
    async fn stamps(&self) -> Stamps {
        let (file, seen) = (self.file.clone(), self.seen.clone());
        spawn_blocking(move || seen.again(file.as_deref())).await.unwrap_or_default()
    }

    /// Puts another policy in force, and says to whom it is open, and what is left to do:
    /// opening archives.
    async fn reload(&mut self) -> Option<(String, impl Future<Output = ()> + Send + use<>)> {
        let reading = Reading {
            source: self.source.clone(),
            file: self.file.clone(),
            fixed: self.fixed.clone(),
            config: self.config.clone(),
            confines: self.confines.clone(),
            tls: self.in_force.tls.clone(),
            served: self.in_force.served.look(&self.control),
        };
        let read = spawn_blocking(move || {
            let mut seen = None;
            (reading.read(&mut seen), seen)
        });
        let (read, seen) = match read.await {
            Ok(read) => read,
            Err(error) => return self.keep(&error),
        };
        // Also if something is wrong: it may be mended in a file that wasn't looked at before.
        if let Some(seen) = seen {
            self.seen = seen;
        }
        let read = match read {
            Ok(read) => read,
            Err(error) => return self.keep(&error),
        };
        let Renewed { snapshots, policy, catalog, and_so, takes_a_restart } = read;
        if !takes_a_restart.is_empty() {
            tracing::warn!("takes a restart: {}", takes_a_restart.join(", "));
        }
        if self.on_loopback && !policy.rules.is_local_only() {
            tracing::warn!(
                "others may connect now, but only loopback is listened on since the start: give \
                 --listen, or start anew",
            );
        }
        self.in_force.tls.clone_from(&policy.tls);
        let (open_to, to) = (policy.rules.to_string(), policy::to_whom(&policy));
        let served = &self.in_force.served;
        let (dropped, turn) = served.judge(&self.control, policy, &snapshots);
        tracing::info!(dropped, "reloaded: open to {open_to}");
        let policy = self.control.policy();
        let open_to = open_to.into();
        self.config.audit.tell(|| Event::Reload(Reload { policy, open_to, dropped }));
        let looking = Looking {
            control: self.control.clone(),
            served: self.in_force.served.clone(),
            turn,
            service: Arc::clone(&self.service),
            catalog,
            snapshots,
            and_so,
        };
        Some((to, looking.look()))
    }

    fn keep<T>(&self, error: &dyn std::fmt::Display) -> Option<T> {
        tracing::error!("not reloaded, everything stays as it was: {error}");
        self.control.note_failed_reload(&error.to_string());
        self.config.audit.tell(|| Event::ReloadFailed(ReloadFailed { why: Text::of(error) }));
        None
    }
}

/// What it takes to read everything anew, beside those who serve.
struct Reading {
    source: Source,
    file: Option<PathBuf>,
    fixed: Fixed,
    config: Config,
    confines: Confines,
    tls: Option<ServerTls>,
    served: (Arc<Catalog>, Snapshots),
}

impl Reading {
    /// Reads everything, and checks that it fits together and can be exchanged. What files were
    /// `seen` to be like before is known as soon as it is known which.
    fn read(&self, seen: &mut Option<Stamps>) -> Result<Renewed, Failure> {
        // Opening a pipe waits for a writer, who may never come.
        no_pipe(&self.file)?;
        let Again { options, stamp, fixed } = self.source.read_again()?;
        *seen = Some(Stamps::of(stamp, &options));
        let takes_a_restart = self.fixed.differing(&fixed);
        let takes_a_restart = takes_a_restart.into_iter().map(str::to_owned).collect();
        // Those who are in could go on in clear where that isn't wanted any more.
        if options.tls.files().is_some() != self.tls.is_some() {
            return Err(Failure::TlsSwitched);
        }
        let closed = self.confines.closed(&options.add_to(Plan::default()));
        if !closed.is_empty() {
            return Err(Failure::OutsideSandbox(closed));
        }
        no_pipe(&options.policy_files())?;
        let policy = policy::read(&options, &self.config, self.tls.as_ref())?;
        let catalog = self.catalog(&options.snapshots)?;
        let and_so = match options.snapshots == self.served.1 {
            false => {
                ", so what is served stays as it was, for those who might open it before and \
                 still may"
            }
            true if opening::has_trust(&options.snapshots.opening) => {
                ", so keys and digests stay as they were"
            }
            true => "",
        };
        Ok(Renewed { snapshots: options.snapshots, policy, catalog, and_so, takes_a_restart })
    }

    /// What is to be served, of which nothing has been opened yet but what was open before.
    fn catalog(&self, wanted: &Snapshots) -> Result<Catalog, Failure> {
        let (exports, before) = &self.served;
        let chosen = exports.choosing(wanted.choice())?;
        Ok(match reopening(exports.options(), &before.opening, &wanted.opening)? {
            Some(options) => chosen.opened_as(options),
            None => chosen,
        })
    }
}

/// How archives are to be opened from now on, if all have to be opened anew for it: keys and
/// digests may have changed in their files.
fn reopening(
    now: &OpenOptions,
    before: &Opening,
    wanted: &Opening,
) -> Result<Option<OpenOptions>, Failure> {
    if before == wanted && !opening::has_trust(wanted) {
        return Ok(None);
    }
    // It comes anew from where it came from; under --user it can't be read here.
    let password = if before.password_file == wanted.password_file {
        now.password.clone()
    } else {
        no_pipe(&wanted.password_file)?;
        password::find(wanted.password_file.as_deref())?
    };
    Ok(Some(opening::with_password(wanted, password)?))
}

fn no_pipe<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), Failure> {
    let is_pipe =
        |path: &Path| std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
    match paths.into_iter().find(|path| is_pipe(path)) {
        Some(pipe) => Err(Failure::Pipe(pipe.clone())),
        None => Ok(()),
    }
}

/// What is left to do when another policy is in force.
struct Looking {
    control: Control<Catalog>,
    served: Served,
    /// The policy that it is for.
    turn: u64,
    service: Arc<Service>,
    catalog: Catalog,
    snapshots: Snapshots,
    and_so: &'static str,
}

impl Looking {
    /// Opens archives that have been replaced, or are new, so that what is wrong with them is
    /// said now and not to the next client alone. As long as none of them can be opened, those
    /// that were served are.
    async fn look(self) {
        let catalog = Arc::new(self.catalog);
        match opening::open(&catalog, &self.snapshots).await {
            Ok(exports) => {
                if self.served.replace(&self.control, self.turn, catalog, self.snapshots) {
                    tracing::info!("served: {exports}");
                    self.service.serves(exports);
                }
            }
            Err(error) => {
                let and_so = self.and_so;
                tracing::error!("an archive can't be served{and_so}: {error}");
            }
        }
    }
}
