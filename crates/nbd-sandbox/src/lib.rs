//! Confines a network service that reads files: privileges that the process gives up once its
//! sockets are bound, so that an attacker who takes it over gains little. Linux only.
//!
//! A [`SandboxPlan`] lists what the process still needs. [`enter`] gives up the rest, once, before
//! there is a second thread: Landlock and capabilities belong to a thread and are inherited by those
//! that it starts. The [`SandboxReport`] says what is enforced, what isn't available, and what will
//! fail later.
//!
//! ```no_run
//! use nbd_sandbox::{SandboxPlan, enter};
//!
//! # fn main() -> Result<(), nbd_sandbox::SandboxError> {
//! let plan = SandboxPlan { files: vec!["/srv/disk.img".into()], ..SandboxPlan::default() };
//! let report = enter(&plan)?;
//! println!("enforced: {}", report.enforced.join(", "));
//! # Ok(())
//! # }
//! ```
//!
//! A process that may not connect can have a dialer that connects for it, a process with a sandbox
//! of its own: see [`enter_dialer`].
//!
//! `paths` determines what stays readable, `landlock` enforces it, `seccomp` limits the system
//! calls, and `privileges` drops capabilities and switches the user.

#![deny(missing_docs, clippy::missing_errors_doc)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod seccomp;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod seccomp {
    const MISSING: &str = "not supported on this processor architecture";

    pub(super) fn restrict(_: super::GatewayNeeds) -> Result<(), &'static str> {
        Err(MISSING)
    }

    pub(super) mod dialer {
        pub(crate) fn restrict(_: std::os::fd::RawFd) -> Result<(), &'static str> {
            Err(super::MISSING)
        }
    }
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub use seccomp::restrict_this_thread;
mod dialer;
mod landlock;
mod paths;
mod privileges;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

pub use dialer::{DialerPlan, enter_dialer};
use nbd_telemetry::escape;
use paths::AllowedPaths;
pub use paths::ReadableSet;
pub use privileges::{User, UserError, is_root};

/// Label of notes about Unix sockets that stay at exit.
const SOCKET_NOT_REMOVABLE: &str = "socket_not_removable";

/// Strictness of the sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Apply whatever the kernel supports.
    #[default]
    Auto,
    /// Apply all of it, or fail in [`enter`].
    Require,
    /// Apply none of it.
    Off,
}

/// Resources that the process still needs inside the sandbox.
#[derive(Debug, Clone, Default)]
pub struct SandboxPlan {
    /// Strictness of the sandbox.
    pub mode: Mode,
    /// User to switch to, if any.
    pub user: Option<User>,
    /// Files and block devices to read. A file may be replaced by another of its name, so its whole
    /// folder stays readable.
    pub files: Vec<PathBuf>,
    /// Files that will be read again on reload, such as keys. They are treated like `files`.
    pub reloaded: Vec<PathBuf>,
    /// Folders to read, with everything in them, now or later.
    pub folders: Vec<PathBuf>,
    /// True if files anywhere have to be readable.
    pub anywhere: bool,
    /// Files to append to. One may be rotated and created anew, so all files in its folder can be
    /// created and appended to.
    pub appended: Vec<PathBuf>,
    /// Unix sockets to remove at exit.
    pub sockets: Vec<PathBuf>,
    /// Socket on which descriptors are received: the one to the dialer, if there is one. It can't
    /// be closed in the sandbox.
    pub receives_descriptors_on: Option<RawFd>,
    /// True if files that are open for writing are written at any offset.
    pub writes_open_files: bool,
}

/// System calls that not every gateway needs.
#[derive(Debug, Clone, Copy, Default)]
struct GatewayNeeds {
    removes_sockets: bool,
    appends: bool,
    writes_open_files: bool,
    receives_descriptors_on: Option<RawFd>,
}

/// Outcome of applying a [`SandboxPlan`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxReport {
    /// Restrictions that are in force.
    pub enforced: Vec<String>,
    /// Restrictions that were wanted but failed, and the reasons.
    pub missing: Vec<String>,
    /// Operations that will fail later unless the setup is changed.
    pub notes: Vec<SandboxNote>,
    /// Files and folders that can be read from now on.
    pub readable: ReadableSet,
}

/// An operation that will fail later, or a risk that remains.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct SandboxNote {
    /// Stable label, such as `socket_not_removable`.
    pub reason: &'static str,
    text: String,
}

impl SandboxNote {
    fn new(reason: &'static str, text: String) -> Self {
        Self { reason, text }
    }
}

/// Reason why the process must not continue.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The sandbox is required, but a part of it isn't available.
    #[error("the sandbox is required, but not available: {0}")]
    Missing(String),
    /// Other threads exist, which would stay outside the sandbox.
    #[error("internal error: the sandbox must be entered by the only thread, found {0} threads")]
    Threads(usize),
    /// Switching to the user failed.
    #[error("can't switch to the user {0}: {1}")]
    User(User, String),
}

/// Gives up everything that `plan` doesn't list. This can't be undone.
///
/// # Errors
/// See [`SandboxError`]. The process should exit then: it may have given up some privileges
/// already.
pub fn enter(plan: &SandboxPlan) -> Result<SandboxReport, SandboxError> {
    if plan.mode != Mode::Off {
        ensure_single_thread()?;
    }
    let mut report = SandboxReport::default();
    if let Some(user) = &plan.user {
        report.switch_to(user)?;
        report.notes.extend(user_permission_notes(plan, user));
    }
    if plan.mode == Mode::Off {
        return Ok(report);
    }

    report.add("no new privileges", rustix::thread::set_no_new_privs(true));
    let kept = privileges::gateway_capabilities(!plan.sockets.is_empty());
    report.add("capabilities dropped", privileges::drop_capabilities(kept));
    report.notes.extend(rotation_notes(plan));
    // After the last change of user or capabilities, since those reset it.
    report.add("no core dumps", disable_core_dumps());

    let readable = AllowedPaths::for_plan(plan);
    match landlock::restrict(&readable, &[]) {
        Ok(landlock) => {
            let appends = readable.describe_appendable();
            report.enforced.push(format!("{landlock}, reads {readable}{appends}"));
            report.notes.extend(landlock.not_allowed);
            report.readable = ReadableSet::new(plan, &readable);
        }
        Err(reason) => report.missing.push(format!("Landlock ({reason})")),
    }
    report.notes.extend(readable.notes);
    // Last, because the steps above need system calls that this forbids.
    let needs = GatewayNeeds {
        removes_sockets: !plan.sockets.is_empty(),
        appends: !plan.appended.is_empty(),
        writes_open_files: plan.writes_open_files,
        receives_descriptors_on: plan.receives_descriptors_on,
    };
    report.add("seccomp", seccomp::restrict(needs));
    report.ensure_complete(plan.mode)
}

impl SandboxError {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Missing(_) => "sandbox_unavailable",
            Self::Threads(_) => "sandbox_threads",
            Self::User(..) => "user",
        }
    }
}

impl SandboxReport {
    fn add(&mut self, part: &str, done: Result<(), impl fmt::Display>) {
        match done {
            Ok(()) => self.enforced.push(part.to_owned()),
            Err(error) => self.missing.push(format!("{part} ({error})")),
        }
    }

    fn switch_to(&mut self, user: &User) -> Result<(), SandboxError> {
        user.switch_to().map_err(|reason| SandboxError::User(user.clone(), reason))?;
        self.enforced.push(format!("user {user}"));
        Ok(())
    }

    /// Returns an error if the sandbox is required, and a part of it is missing.
    fn ensure_complete(self, mode: Mode) -> Result<Self, SandboxError> {
        if mode == Mode::Require && !self.missing.is_empty() {
            return Err(SandboxError::Missing(self.missing.join("; ")));
        }
        Ok(self)
    }
}

/// Checks that the process has a single thread. Where /proc isn't mounted, this relies on the
/// caller.
fn ensure_single_thread() -> Result<(), SandboxError> {
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(threads) if threads > 1 => Err(SandboxError::Threads(threads)),
        _ => Ok(()),
    }
}

/// Keeps the memory, with the keys in it, out of core dumps and away from other processes of the
/// same user. The limit applies to dumps by the kernel; a program that handles dumps isn't bound by
/// it.
fn disable_core_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Returns notes about audit files that can't be created again after log rotation.
fn rotation_notes(plan: &SandboxPlan) -> impl Iterator<Item = SandboxNote> {
    let stuck = plan.appended.iter().filter(|path| path.is_file() && !is_folder_writable(path));
    stuck.map(|path| {
        let text = format!(
            "{} can't be created again after log rotation: this user can't create files in its \
             folder",
            escape::path(path)
        );
        SandboxNote::new("file_not_recreatable", text)
    })
}

/// Returns true if files can be created and removed in the folder of `path`.
fn is_folder_writable(path: &Path) -> bool {
    use rustix::fs::{Access, access};
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    access(folder.unwrap_or(Path::new(".")), Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// Returns notes about what the process won't be able to do later as `user`.
fn user_permission_notes(plan: &SandboxPlan, user: &User) -> Vec<SandboxNote> {
    use rustix::fs::{Access, access};
    let unreadable = |path: &&PathBuf| access(path.as_path(), Access::READ_OK).is_err();
    let unreadable = plan.reloaded.iter().filter(unreadable).map(|path| {
        let text = format!("{} can't be read again by the user {user}", escape::path(path));
        SandboxNote::new("file_not_rereadable", text)
    });
    let stuck = plan.sockets.iter().filter(|path| !is_folder_writable(path)).map(|path| {
        let text = format!(
            "{} can't be removed at exit by the user {user}, and stays until the next start",
            escape::path(path)
        );
        SandboxNote::new(SOCKET_NOT_REMOVABLE, text)
    });
    unreadable.chain(stuck).collect()
}
