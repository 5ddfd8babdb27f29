//! Plans what the program still needs inside the sandbox, enters it, and logs the outcome.

use std::path::{Path, PathBuf};

use hexz_reader::storage::is_url;
use nbd_gateway::listen::ListenAddress;
use nbd_sandbox::{Mode, ReadableSet, SandboxError, SandboxPlan};

use super::{archives, monitor, password};
use crate::cli::{MonitorAddress, ReloadableOptions};
use crate::exit_status::labeled_exit_status;
use crate::settings::Settings;

labeled_exit_status! {
    SandboxError => SANDBOX;
}

/// Returns the plan of what the program still needs inside the sandbox.
pub(super) fn plan(settings: &Settings) -> SandboxPlan {
    let serve = &settings.cli.serve;
    let socket = |address: &ListenAddress| match address {
        ListenAddress::Unix(path) => Some(path.clone()),
        ListenAddress::Tcp(_) | ListenAddress::Vsock { .. } => None,
    };
    let addresses = serve.network.listen.iter();
    let addresses =
        addresses.chain(serve.monitoring.monitor.as_ref().and_then(MonitorAddress::address));
    let plan = SandboxPlan {
        mode: serve.sandbox.mode(),
        user: serve.sandbox.user.clone(),
        appended: serve.audit.file().map(Path::to_owned).into_iter().collect(),
        sockets: addresses.filter_map(socket).chain(serve.network.control_socket.clone()).collect(),
        ..SandboxPlan::default()
    };
    let mut plan = add_files(plan, &serve.changeable);
    plan.reloaded.extend(settings.cli.file.config.clone());
    #[cfg(feature = "remote")]
    plan.folders.extend(serve.traces.folder().filter(|path| !is_url(path)));
    plan.reloaded.extend(monitor::auth_files(&serve.monitoring).paths().cloned());
    plan
}

/// Adds all files and folders that these options name, and that are read now or later.
pub(super) fn add_files(plan: SandboxPlan, options: &ReloadableOptions) -> SandboxPlan {
    let snapshots = &options.snapshots;
    // A password from a pipe isn't read again.
    let password = password::password_file(snapshots.opening.password_file.as_deref());
    let password = password.filter(|path| path.is_file());
    let files = policy_files(options).into_iter().chain(password);
    SandboxPlan {
        reloaded: plan.reloaded.iter().cloned().chain(files).collect(),
        files: snapshots.paths().filter(|path| !is_url(path)).map(Path::to_owned).collect(),
        folders: snapshots.folders().filter(|path| !is_url(path)).map(Path::to_owned).collect(),
        anywhere: snapshots.opening.allow_parent_anywhere,
        ..plan
    }
}

/// Returns the files that determine who has access, and which archives may be opened.
pub(super) fn policy_files(options: &ReloadableOptions) -> Vec<PathBuf> {
    let tls = options.tls.files();
    let tls = tls.iter().flat_map(|(files, _)| files.paths().cloned());
    let rules = options.access.file().cloned();
    tls.chain(rules).chain(archives::key_and_digest_files(&options.snapshots.opening)).collect()
}

/// Drops the privileges that serving doesn't need. Logs what is enforced and what isn't, and
/// returns which paths remain readable.
///
/// A server that its client starts has the client's user, and ends with the client: that it runs
/// as root is no warning then.
pub(super) fn enter_sandbox(
    plan: &SandboxPlan,
    is_started_by_client: bool,
) -> Result<ReadableSet, SandboxError> {
    let report = nbd_sandbox::enter(plan)?;
    match (plan.mode, report.enforced.as_slice()) {
        (Mode::Off, []) => tracing::debug!("sandbox: off"),
        (Mode::Off, user) => tracing::debug!("sandbox: off; {}", user.join("; ")),
        (_, enforced) => tracing::debug!("sandbox: {}", enforced.join("; ")),
    }
    if !report.missing.is_empty() {
        let reason = "sandbox_incomplete";
        tracing::warn!(reason, "sandbox: not available here: {}", report.missing.join("; "));
    }
    for note in report.notes {
        tracing::warn!(reason = note.reason, "sandbox: {note}");
    }
    if plan.user.is_none() && nbd_sandbox::is_root() {
        let reason = "running_as_root";
        let advice = "running as root: use --user USER to drop privileges after startup";
        match is_started_by_client {
            true => tracing::info!(reason, "{advice}"),
            false => tracing::warn!(reason, "{advice}"),
        }
    }
    Ok(report.readable)
}
