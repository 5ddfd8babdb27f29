//! The sandbox of a dialer: a process that resolves names and connects for another one, whose
//! sandbox permits neither.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::CapabilitySet;

use nbd_telemetry::escape;

use super::paths::AllowedPaths;
use super::{
    Mode, SandboxError, SandboxNote, SandboxReport, User, disable_core_dumps, ensure_single_thread,
    landlock, privileges, seccomp,
};

const RESOLVER_CONFIG: &str = "/etc/resolv.conf";
/// Files that resolvers read, and the list of shared libraries.
const RESOLVER_FILES: [&str; 6] = [
    RESOLVER_CONFIG,
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
];
/// Folders of the modules that glibc loads when it resolves a name.
const LIBRARY_FOLDERS: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];
/// DNS over TCP, for long responses.
const DNS_PORT: u16 = 53;

/// Resources that a dialer needs.
#[derive(Debug, Clone, Default)]
pub struct DialerPlan {
    /// Strictness of the sandbox.
    pub mode: Mode,
    /// User to switch to, if any.
    pub user: Option<User>,
    /// TCP ports to connect to.
    pub ports: Vec<u16>,
    /// Socket on which connections are passed to the parent.
    pub socket: RawFd,
}

/// Gives up everything that `plan` doesn't list, and arranges that the process is killed when its
/// parent ends. This can't be undone.
///
/// # Errors
/// See [`SandboxError`]. The process should exit then: it may have given up some privileges
/// already.
pub fn enter_dialer(plan: &DialerPlan) -> Result<SandboxReport, SandboxError> {
    let mut report = SandboxReport::default();
    if plan.mode != Mode::Off {
        ensure_single_thread()?;
    }
    if let Some(user) = &plan.user {
        report.switch_to(user)?;
    }
    // After the change of user, since that resets it.
    report.add("ends with its parent", set_parent_process_death_signal(Some(Signal::KILL)));
    if plan.mode == Mode::Off {
        return Ok(report);
    }

    report.add("no new privileges", rustix::thread::set_no_new_privs(true));
    let capabilities = privileges::drop_capabilities(CapabilitySet::empty());
    report.add("capabilities dropped", capabilities);
    report.add("no core dumps", disable_core_dumps());

    let readable = resolver_paths();
    let ports: BTreeSet<u16> = plan.ports.iter().copied().chain([DNS_PORT]).collect();
    let ports: Vec<u16> = ports.into_iter().collect();
    match landlock::restrict(&readable, &ports) {
        Ok(landlock) => {
            let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            let tcp = if landlock.restricts_tcp() { &ports } else { "any" };
            report.enforced.push(format!("{landlock}, TCP ports {tcp}, reads {readable}"));
            report.notes.extend(landlock.not_allowed);
            report.notes.extend(replacement_note());
        }
        Err(reason) => report.missing.push(format!("Landlock ({reason})")),
    }
    // Last, because the steps above need system calls that this forbids.
    report.add("seccomp", seccomp::dialer::restrict(plan.socket));
    report.ensure_complete(plan.mode)
}

/// Returns what resolvers read.
fn resolver_paths() -> AllowedPaths {
    let files = RESOLVER_FILES.into_iter().filter(|path| Path::new(path).exists());
    let libraries = LIBRARY_FOLDERS.into_iter().filter(|_| cfg!(not(target_env = "musl")));
    let folders = libraries.filter(|path| Path::new(path).is_dir()).map(PathBuf::from);
    AllowedPaths {
        files: files.map(PathBuf::from).collect(),
        folders: folders.chain(generated_config_folder()).collect(),
        ..AllowedPaths::default()
    }
}

/// Returns the folder in which a service maintains the resolver's configuration, such as
/// `/run/systemd/resolve`, if there is one. The service replaces the file, so the whole folder has
/// to be readable.
fn generated_config_folder() -> Option<PathBuf> {
    let folder = fs::canonicalize(RESOLVER_CONFIG).ok()?.parent()?.to_owned();
    // Not `/etc` or `/run`, which contain other things.
    (folder.components().count() > 2).then_some(folder)
}

/// Returns a note if another file could replace the resolver's configuration. A file that was
/// mounted, as in containers, can't be replaced.
fn replacement_note() -> Option<SandboxNote> {
    let config = fs::canonicalize(RESOLVER_CONFIG).ok()?;
    let folder = config.parent()?;
    let is_mounted = fs::metadata(&config).ok()?.dev() != fs::metadata(folder).ok()?.dev();
    if generated_config_folder().is_some() || is_mounted {
        return None;
    }
    let text = format!(
        "{} can be read as long as no other file replaces it: restart after changing it",
        escape::name(&config)
    );
    Some(SandboxNote::new("replacement_not_readable", text))
}
