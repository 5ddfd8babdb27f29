//! Enters the sandbox, and logs the outcome.

use nbd_sandbox::{Confines, Mode, Plan, SandboxError};

/// Drops the privileges that serving doesn't need. Logs what is enforced and what isn't, and
/// returns which paths remain readable.
pub(crate) fn confine(plan: &Plan) -> Result<Confines, SandboxError> {
    let report = nbd_sandbox::enter(plan)?;
    match (plan.mode, report.enforced.as_slice()) {
        (Mode::Off, []) => tracing::info!("sandbox: off"),
        (Mode::Off, user) => tracing::info!("sandbox: off; {}", user.join("; ")),
        (_, enforced) => tracing::info!("sandbox: {}", enforced.join("; ")),
    }
    if !report.missing.is_empty() {
        tracing::warn!("sandbox: not to be had here: {}", report.missing.join("; "));
    }
    for note in report.notes {
        tracing::warn!("sandbox: {note}");
    }
    if plan.user.is_none() && nbd_sandbox::is_root() {
        tracing::warn!(
            "running as root: --user USER goes on as another one as soon as sockets are bound and \
             keys are read",
        );
    }
    Ok(report.confines)
}
