//! What the process gives up once its sockets are bound, so that whoever takes it over, by
//! whatever fault, has little.
//!
//! `paths` decides what stays readable, `calls` which system calls are left, `rights` whose
//! rights they are made with; [`enter`] applies it all, once, before there is a second thread:
//! Landlock and capabilities are each thread's own, and handed down to those that it starts.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod calls;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod calls {
    pub(super) fn restrict(_: bool, _: bool) -> Result<(), &'static str> {
        Err("nobody has listed the calls for this processor")
    }
}
#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use calls::restrict_this_thread;
mod files;
mod paths;
mod rights;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

pub use paths::Confines;
use paths::Readable;
pub use rights::{User, UserError, is_root};

/// How much the sandbox matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// As much of it as the kernel has.
    #[default]
    Auto,
    /// All of it, or [`enter`] fails.
    Require,
    /// None of it.
    Off,
}

/// What the process goes on needing.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// How much of the sandbox there has to be.
    pub mode: Mode,
    /// Whose rights the process goes on with, if not those that it has.
    pub user: Option<User>,
    /// Files and block devices to read. A file may be replaced by another one of its name, so
    /// all of its folder stays readable.
    pub files: Vec<PathBuf>,
    /// The same for files that will be read again, such as keys.
    pub reloaded: Vec<PathBuf>,
    /// Folders to read, with all that is in them, now or later.
    pub folders: Vec<PathBuf>,
    /// Whether files anywhere are to be read.
    pub anywhere: bool,
    /// Files to append to. One may be put out of the way and made anew, so the same can be done
    /// with all in its folder.
    pub appended: Vec<PathBuf>,
    /// Unix sockets that are removed at the end.
    pub sockets: Vec<PathBuf>,
}

/// What came of a [`Plan`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is in force.
    pub enforced: Vec<String>,
    /// What isn't, though it was wanted, and why.
    pub missing: Vec<String>,
    /// What will fail later, which can be mended.
    pub notes: Vec<String>,
    /// What can be read from now on.
    pub confines: Confines,
}

/// Why the process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Not all of the sandbox can be had, and all of it is required.
    #[error("the sandbox is required, but not to be had: {0}")]
    Missing(String),
    /// Other threads would stay outside.
    #[error("there are {0} threads already; this is a fault of this program")]
    Threads(usize),
    /// The user can't be changed.
    #[error("can't go on as the user {0}: {1}")]
    User(User, String),
}

/// Gives up whatever `plan` doesn't name, for good.
///
/// # Errors
/// See [`SandboxError`]. The process should end then: it may have given up a part.
pub fn enter(plan: &Plan) -> Result<Report, SandboxError> {
    if plan.mode != Mode::Off {
        one_thread()?;
    }
    let mut report = Report::default();
    if let Some(user) = &plan.user {
        user.take_over().map_err(|reason| SandboxError::User(user.clone(), reason))?;
        report.enforced.push(format!("user {user}"));
        report.notes.extend(out_of_reach(plan, user));
    }
    if plan.mode == Mode::Off {
        return Ok(report);
    }

    report.add("no new privileges", rustix::thread::set_no_new_privs(true));
    report.add("capabilities dropped", rights::drop_capabilities(!plan.sockets.is_empty()));
    report.notes.extend(not_made_anew(plan));
    // After the last change of user or capabilities, since those undo it.
    report.add("no core dumps", no_core_dumps());

    let readable = Readable::of(plan);
    match files::restrict(&readable) {
        Ok(landlock) => {
            let appends = readable.appends();
            report.enforced.push(format!("{landlock}, reads {readable}{appends}"));
            report.notes.extend(landlock.left_out);
            report.confines = Confines::new(plan, &readable);
        }
        Err(reason) => report.missing.push(format!("Landlock ({reason})")),
    }
    report.notes.extend(readable.notes);
    // Last, for what is above needs calls that it takes away.
    let (sockets, appended) = (!plan.sockets.is_empty(), !plan.appended.is_empty());
    report.add("seccomp", calls::restrict(sockets, appended));

    if plan.mode == Mode::Require && !report.missing.is_empty() {
        return Err(SandboxError::Missing(report.missing.join("; ")));
    }
    Ok(report)
}

impl Report {
    fn add(&mut self, part: &str, done: Result<(), impl fmt::Display>) {
        match done {
            Ok(()) => self.enforced.push(part.to_owned()),
            Err(error) => self.missing.push(format!("{part} ({error})")),
        }
    }
}

/// Where /proc isn't mounted, the caller has to be believed.
fn one_thread() -> Result<(), SandboxError> {
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(threads) if threads > 1 => Err(SandboxError::Threads(threads)),
        _ => Ok(()),
    }
}

/// Neither a crash nor another process of the same user shows this one's memory, with the
/// keys in it. The limit is for kernels' own dumps; a program that takes them over isn't bound
/// by it.
fn no_core_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Files that can't be made anew when somebody has put them out of the way, as those who rotate
/// logs do.
fn not_made_anew(plan: &Plan) -> impl Iterator<Item = String> {
    let stuck = plan.appended.iter().filter(|path| path.is_file() && !is_writable(path));
    stuck.map(|path| {
        format!(
            "{} can't be made anew when it is rotated: this user may not make files in its folder",
            path.display()
        )
    })
}

/// Whether files can be made and removed in the folder of `path`.
fn is_writable(path: &Path) -> bool {
    use rustix::fs::{Access, access};
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    access(folder.unwrap_or(Path::new(".")), Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// What the user that the process now runs as won't be able to do later.
fn out_of_reach(plan: &Plan, user: &User) -> Vec<String> {
    use rustix::fs::{Access, access};
    let unreadable = |path: &&PathBuf| access(path.as_path(), Access::READ_OK).is_err();
    let unreadable = plan.reloaded.iter().filter(unreadable).map(|path| {
        format!("{} can't be read again: the user {user} may not read it", path.display())
    });
    let stuck = plan.sockets.iter().filter(|path| !is_writable(path)).map(|path| {
        format!(
            "{} will stay behind at the end, until the next start: the user {user} may not \
             remove it",
            path.display()
        )
    });
    unreadable.chain(stuck).collect()
}
