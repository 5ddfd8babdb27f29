//! From settings to a gateway that serves, and to its end.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use hexz_nbd::audit::{Event, Start, Text};
use hexz_nbd::config::{Config, ConfigError};
use hexz_nbd::exports::{BlockReader, Catalog, CatalogError, SnapshotExport};
use hexz_nbd::gateway::access::RulesFileError;
use hexz_nbd::gateway::handed::HandedError;
use hexz_nbd::gateway::listen::{BindError, ListenAddress};
use hexz_nbd::gateway::stdio::StdioError;
use hexz_nbd::gateway::tls::TlsError;
use hexz_nbd::gateway::{Control, DoorClosed, Gateway, Policy};
use hexz_nbd::monitor::RecentErrors;
use hexz_nbd::nbd::Export;
use hexz_nbd::sandbox::SandboxError;
use hexz_nbd::snapshot::Error as SnapshotError;
use hexz_nbd::storage;

use crate::cli::Snapshots;
use crate::confine::confine;
use crate::door::{Door, Entrance};
use crate::opening::{self, TrustError};
use crate::password::PasswordError;
use crate::pki::PkiError;
use crate::policy;
use crate::record::{self, AuditError, Record};
use crate::reload::{self, InForce, Reloading, Served, Stamps};
use crate::service::{Manager, Service};
use crate::settings::{Refused, Settings, Source};
use crate::show::Show;
use crate::top::AskError;

/// Why the program ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Usage(#[from] ConfigError),
    #[error(
        "rules ask who a client is, but clients aren't asked for a certificate: give --tls-client-ca"
    )]
    IdentityWithoutCa,
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("can't read the folder {}: {error}", .folder.display())]
    Folder { folder: PathBuf, error: io::Error },
    #[error("can't write {}: {error}", .path.display())]
    Write { path: PathBuf, error: io::Error },
    #[error("can't use the password: {0}")]
    Password(#[from] PasswordError),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("can't use TLS: {0}")]
    Tls(#[from] TlsError),
    #[error("can't use the rules: {0}")]
    Rules(#[from] RulesFileError),
    #[error("{} is a pipe, which can be read only once", .0.display())]
    Pipe(PathBuf),
    #[error(
        "the socket \"monitor\" is handed over, and --monitor is given as well: leave one of them \
         away"
    )]
    MonitorAndHanded,
    #[error(transparent)]
    Settings(#[from] Refused),
    #[error("TLS can't be switched on or off while clients are served; it takes a restart")]
    TlsSwitched,
    #[error(
        "{} outside what the sandbox lets this program read; it takes a restart",
        is_or_are(.0)
    )]
    OutsideSandbox(Vec<PathBuf>),
    #[error(transparent)]
    Listen(#[from] BindError),
    #[error(
        "--listen is given, but the service manager hands over sockets to listen on (LISTEN_FDS): \
         leave out one of them"
    )]
    ListenAndHanded,
    #[error(transparent)]
    Handed(#[from] HandedError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(transparent)]
    Door(#[from] DoorClosed),
    #[error("the system refused: {0}")]
    System(#[from] io::Error),
    #[error("the demonstration failed: {0}")]
    Demo(String),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Status(#[from] AskError),
}

impl Failure {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Door(_)
            | Self::System(_)
            | Self::Write { .. }
            | Self::Demo(_)
            | Self::Status(_) => 1,
            Self::Usage(_)
            | Self::IdentityWithoutCa
            | Self::ListenAndHanded
            | Self::MonitorAndHanded
            | Self::Catalog(_)
            | Self::Rules(_)
            | Self::Pipe(_)
            | Self::Settings(_)
            | Self::TlsSwitched
            | Self::OutsideSandbox(_) => 2,
            Self::Pki(error) => error.exit_code(),
            Self::Snapshot(_) | Self::Folder { .. } | Self::Password(_) | Self::Trust(_) => 3,
            Self::Tls(_) => 4,
            Self::Listen(_) | Self::Handed(_) | Self::Stdio(_) => 5,
            Self::Sandbox(_) => 6,
            Self::Audit(AuditError::Taken) => 2,
            Self::Audit(_) => 7,
        }
    }
}

/// Opens everything, then serves until a signal, or, with `--stdio`, until its client is gone.
pub(crate) fn serve(
    source: Source,
    settings: Settings,
    recent: RecentErrors,
) -> Result<(), Failure> {
    reload::hold_hangups()?;
    let plan = settings.plan();
    let Settings { cli, stamp, fixed, .. } = settings;
    let (file, options) = (cli.file.config, cli.serve);
    let mut config = options.config();
    let mut door = Door::find(&options, &mut config)?;
    let monitor = door.monitor();
    let manager = Manager::find();
    let seen = Stamps::of(stamp, &options.changeable);
    let policy = policy::read(&options.changeable, &config, None)?;
    let snapshots = options.changeable.snapshots.clone();
    let catalog = options.catalog(opening::options(&snapshots.opening)?)?;
    tracing::debug!("limits: {}; {}", config.limits, config.timeouts);
    tracing::debug!("memory: {}", options.memory());
    warn_of_surprises(&config, &policy);
    raise_descriptor_limit();
    let local_only = policy.rules.is_local_only();
    let entrance = door.open(&config, local_only, &options.socket_rights())?;
    let on_loopback = config.listen.is_empty() && local_only && !options.stdio();
    let target = record::open(&options.audit, options.stdio())?;
    let show = Show::prepare(&options, monitor, catalog.reader(), recent)?;
    let runtime = runtime();
    let confines = confine(&plan)?;
    let record = Record::start(target)?;
    config.audit = record.audit();
    let shown = show.start()?;
    if let Some(counts) = record.counts() {
        shown.observed.audit(counts);
    }

    let mut finish_by = None;
    let ended = until_signal(runtime, async |shutdown| {
        let hangup = reload::hangup()?;
        let service = Arc::new(Service::new(manager)?);
        // To compare an archive with its digest can take long; nobody has to wait for it.
        let opening = shutdown.run_until_cancelled(open(&catalog, &snapshots));
        let opened = service.starting(progress, opening).await;
        let Some(what) = opened.transpose()? else { return Ok(()) };
        let (has_tls, open_to) = (policy.tls.is_some(), policy.rules.to_string());
        let to = to_whom(&policy);
        let reader = Arc::clone(catalog.reader());
        let watch = options.watch();
        let options = options.changeable;
        let in_force = InForce { options, tls: policy.tls.clone(), served: Served::new(snapshots) };
        let (connection, sockets) = match entrance {
            Entrance::Connection(connection) => (Some(connection), Vec::new()),
            Entrance::Sockets(sockets) => (None, sockets),
        };
        let gateway = Gateway::new(sockets, config.clone(), policy, catalog)?;
        let listen = match &connection {
            Some(connection) => vec![connection.to_string()],
            None => gateway.addresses()?.iter().map(ToString::to_string).collect(),
        };
        let control = gateway.control();
        let (audit, patience) = (config.audit.clone(), config.timeouts.shutdown);
        shown.observed.gateway({
            let control = control.clone();
            move || control.report()
        });
        let reloading = Reloading {
            source,
            file,
            fixed,
            config,
            confines,
            control: control.clone(),
            service: Arc::clone(&service),
            seen,
            on_loopback,
            in_force,
            record: record.clone(),
        };
        let mut beside = JoinSet::new();
        beside.spawn(reloading.on_signal(hangup, watch));
        tracing::info!(listen = %listen.join(", "), "ready: serving {what} {to}");
        service.ready(what, to).await;
        audit.tell(|| start(&listen, has_tls, open_to));
        beside.spawn(attend(
            Arc::clone(&service),
            control.clone(),
            reader.clone(),
            shutdown.clone(),
        ));
        let (told, mut told_at) = (shutdown.clone(), None);
        let serving = async {
            match connection {
                Some(connection) => {
                    gateway.run_one(connection, shutdown).await.map_err(Failure::from)
                }
                None => gateway.run(shutdown).await.map_err(Failure::from),
            }
        };
        let ended = tokio::select! {
            ended = serving => ended,
            never = note_when(&told, &mut told_at) => match never {},
        };
        finish_by = told_at.map(|at| at + patience);
        drop(beside);
        service.stopping().await;
        for (what, counts) in [
            ("connections were refused or failed", control.failures()),
            ("TLS handshakes failed", control.handshake_failures()),
        ] {
            if !counts.0.is_empty() {
                tracing::info!("{what}: {counts}");
            }
        }
        tracing::info!(decoded = reader.decoded(), "ended; so many blocks were decoded");
        ended
    });
    // All connections have ended by now, and have told so.
    let failure = ended.as_ref().err().map(Text::of);
    record.finish(failure, finish_by.unwrap_or_else(Instant::now));
    ended
}

/// Notes when the program was told to end.
async fn note_when(told: &CancellationToken, at: &mut Option<Instant>) -> Infallible {
    told.cancelled().await;
    *at = Some(Instant::now());
    std::future::pending().await
}

/// What the audit is told when all is ready.
fn start(listen: &[String], tls: bool, open_to: String) -> Event {
    Event::Start(Start {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        listen: listen.iter().map(Text::of).collect(),
        tls,
        policy: 0,
        open_to: open_to.into(),
    })
}

/// Keeps the service manager informed for as long as clients are served.
async fn attend(
    service: Arc<Service>,
    control: Control<Catalog>,
    reader: Arc<BlockReader>,
    shutdown: CancellationToken,
) {
    // A worker of the runtime takes up a task, and a thread that decodes a job.
    let works = || {
        let reader = Arc::clone(&reader);
        async move { tokio::spawn(async move { reader.works().await }).await.unwrap_or(false) }
    };
    let stopping = async {
        shutdown.cancelled().await;
        service.stopping().await;
    };
    tokio::join!(service.keep_status(|| control.reading()), service.keep_alive(works), stopping);
}

/// Grows while archives are opened: bytes that were hashed, and tenths of a second of processor
/// time, as it takes to make a key of a password.
fn progress() -> (u64, i64) {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    (storage::hashed(), time.tv_sec * 10 + time.tv_nsec / 100_000_000)
}

/// How, and to whom, something is served.
pub(crate) fn to_whom(policy: &Policy) -> String {
    let how = match &policy.tls {
        Some(tls) if tls.requires_certificates() => "over TLS with certificates",
        Some(_) => "over TLS",
        None => "without TLS",
    };
    format!("{how} to {}", policy.rules)
}

/// Opens the archives that were named, and says what will be served.
pub(crate) async fn open(catalog: &Catalog, options: &Snapshots) -> Result<String, Failure> {
    let (exports, mut failed) = catalog.open_named().await;
    let nothing_is_left = exports.is_empty() && options.export_dir().is_none();
    let fatal = if options.strict || nothing_is_left { failed.pop() } else { None };
    for error in failed {
        tracing::error!("left out: {error}");
    }
    if let Some(error) = fatal {
        return Err(error.into());
    }
    if let Some(name) = options.default_export()
        && !catalog.has(name).await
    {
        tracing::warn!("the default export {name:?} isn't there (yet)");
    }
    exports.iter().for_each(note_odd_size);
    let named =
        exports.iter().map(|export| format!("{} ({})", export.name(), export.description()));
    let folder = match options.export_dir() {
        Some(folder) => {
            let failed = |error| Failure::Folder { folder: folder.to_owned(), error };
            std::fs::read_dir(folder).map_err(failed)?;
            Some(format!("every archive in {}", folder.display()))
        }
        None => None,
    };
    Ok(named.chain(folder).collect::<Vec<_>>().join(", "))
}

/// The runtime, not started yet. How many threads it gets is found out here: the control
/// group's limit can't be read in the sandbox.
pub(crate) fn runtime() -> runtime::Builder {
    let mut runtime = runtime::Builder::new_multi_thread();
    runtime.event_interval(5).global_queue_interval(5).enable_all();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none()
        && let Ok(cores) = std::thread::available_parallelism()
    {
        runtime.worker_threads(cores.get());
    }
    runtime
}

/// Does `work` until it is done. SIGTERM and SIGINT cancel the token that it is given; a
/// second signal ends it at once.
pub(crate) fn until_signal(
    mut runtime: runtime::Builder,
    work: impl AsyncFnOnce(CancellationToken) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let runtime = runtime.build()?;
    let ended = runtime.block_on(async {
        let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = CancellationToken::new();
        tokio::select! {
            done = work(shutdown.clone()) => done,
            () = two_signals(signals, &shutdown) => Ok(()),
        }
    });
    // A thread that hangs in a read of a dead file system must not keep the program.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn two_signals(
    (mut terminate, mut interrupt): (Signal, Signal),
    shutdown: &CancellationToken,
) {
    let mut either = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    either().await;
    tracing::info!("told to end: answering what has been asked, accepting nothing new");
    shutdown.cancel();
    either().await;
    tracing::warn!("told to end again: ending at once");
}

fn note_odd_size(export: &SnapshotExport) {
    const SECTOR: u64 = 512;
    if !export.size().is_multiple_of(SECTOR) {
        tracing::warn!(
            "{} has {} bytes, which is no multiple of 512: some clients, the Linux kernel's \
             among them, won't see its last {} bytes",
            export.name(),
            export.size(),
            export.size() % SECTOR,
        );
    }
}

/// Takes as many file descriptors as the system lets it: each connection needs one, and
/// the usual limit of 1024 is for programs that can't count farther.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
}

/// "a is" or "a, b are".
fn is_or_are(paths: &[PathBuf]) -> String {
    let all: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    format!("{} {}", all.join(", "), if all.len() == 1 { "is" } else { "are" })
}

pub(crate) fn warn_of_surprises(config: &Config, policy: &Policy) {
    if config.insecure_no_tls {
        tracing::warn!("no TLS: anyone on the way to a client can read and change what it reads",);
    }
    let exposed = config.listen.iter().find(|address| !address.is_local());
    if let Some(address) = exposed
        && policy.rules.is_local_only()
    {
        tracing::warn!(
            "listening on {address}, but no other machine may connect: --allow or --rules lets them in",
        );
    }
    let vsock = config.listen.iter().find(|at| matches!(at, ListenAddress::Vsock { .. }));
    if let Some(address) = vsock
        && !policy.rules.are_open_to_vsock()
    {
        tracing::warn!(
            "listening on {address}, but no virtual machine may connect: --allow vsock:CID or --rules \
             lets them in",
        );
    }
    if !config.proxies.is_empty() && policy.rules.is_local_only() {
        tracing::warn!(
            "--proxy-from names load balancers, but no other machine may connect, so none of their \
             clients: --allow or --rules lets them in",
        );
    }
}
