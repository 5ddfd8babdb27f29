//! Loads the access policy: reads rules, certificates, CAs and revocation lists, and checks that
//! they are consistent.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nbd_gateway::Policy;
use nbd_gateway::access::{Rules, RulesFileError};
use nbd_gateway::config::{Config, ConfigError};
use nbd_gateway::listen::ListenAddress;
use nbd_gateway::tls::{self, ServerTls, TlsFileError};
use nbd_telemetry::escape;

use super::sandbox;
use crate::cli::{ReloadableOptions, TlsOptions};
use crate::exit_status::{self, ExitStatus};

/// Reason for which there is no policy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AccessError {
    #[error("{0}: {advice}", advice = config_advice(.0))]
    Config(#[from] ConfigError),
    #[error("can't use the rules: {0}")]
    Rules(#[from] RulesFileError),
    #[error("can't use TLS: {0}")]
    Tls(#[from] TlsFileError),
    #[error(
        "rules require client identities, but clients aren't asked for certificates: set \
         --tls-client-ca"
    )]
    IdentityWithoutCa,
}

impl ExitStatus for AccessError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Tls(_) => exit_status::TLS,
            Self::Config(_) | Self::Rules(_) | Self::IdentityWithoutCa => exit_status::USAGE,
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Config(error) => error.label(),
            Self::Rules(error) => error.problem.label(),
            Self::Tls(error) => error.problem.label(),
            Self::IdentityWithoutCa => "identity_without_ca",
        }
    }
}

/// Returns the options that resolve contradictory settings.
fn config_advice(error: &ConfigError) -> &'static str {
    match error {
        ConfigError::AllowWithoutTls(_) => {
            "use --tls-cert and --tls-key, or --insecure-no-tls if the network can be trusted"
        }
        ConfigError::ListenWithoutTls(_) => {
            "use --tls-cert and --tls-key, listen on 127.0.0.1, [::1] or unix:PATH, or use \
             --insecure-no-tls if the network can be trusted"
        }
    }
}

/// Reads the policy. Keeps the key of `before` if it can't be read again.
pub(crate) fn read(
    options: &ReloadableOptions,
    config: &Config,
    before: Option<&ServerTls>,
) -> Result<Policy, AccessError> {
    warn_world_writable(options);
    let rules = options.access.rules()?;
    config.check(&rules, options.tls.files().is_some())?;
    let tls = read_tls(&options.tls, before)?;
    check_identity_rules(&rules, tls.as_ref())?;
    Ok(Policy { rules, tls })
}

/// Reads the policy like [`read`], but collects all errors, in the order in which they would stop
/// the startup.
pub(crate) fn read_collecting_errors(
    options: &ReloadableOptions,
    config: &Config,
) -> Result<Policy, Vec<AccessError>> {
    warn_world_writable(options);
    let mut failures = Vec::new();
    let rules = options.access.rules().map_err(|error| failures.push(error.into())).ok();
    if let Some(rules) = &rules
        && let Err(error) = config.check(rules, options.tls.files().is_some())
    {
        failures.push(error.into());
    }
    let tls = read_tls(&options.tls, None).map_err(|error| failures.push(error)).ok();
    let (Some(rules), Some(tls)) = (rules, tls) else { return Err(failures) };
    if let Err(error) = check_identity_rules(&rules, tls.as_ref()) {
        failures.push(error);
    }
    if failures.is_empty() { Ok(Policy { rules, tls }) } else { Err(failures) }
}

fn read_tls(
    options: &TlsOptions,
    before: Option<&ServerTls>,
) -> Result<Option<ServerTls>, AccessError> {
    let Some((files, oldest)) = options.files() else { return Ok(None) };
    let (tls, warnings) = tls::load(&files, oldest, before)?;
    for warning in warnings {
        tracing::warn!(reason = warning.reason, "{warning}");
    }
    Ok(Some(tls))
}

/// Warns about policy files that every user of this machine can modify or replace: those that
/// decide which clients are admitted, and which archives may be opened.
fn warn_world_writable(options: &ReloadableOptions) {
    for path in sandbox::policy_files(options) {
        if let Some(writable) = find_world_writable(&path) {
            let (path, writable) = (escape::path(&path), escape::path(&writable));
            tracing::warn!(
                reason = "writable_by_all",
                "every user of this machine can modify or replace {path}: chmod o-w {writable}"
            );
        }
    }
}

/// Returns the file, or its folder, if every user can write to it and so modify or replace the
/// file. Symbolic links are followed, since the location of the file itself counts.
fn find_world_writable(path: &Path) -> Option<PathBuf> {
    const BY_OTHERS: u32 = 0o002;
    // In a sticky folder, only owners can remove files.
    const STICKY: u32 = 0o1000;
    let real = path.canonicalize().ok()?;
    let mode = |path: &Path| path.metadata().ok().map(|it| it.mode());
    if real.is_file() && mode(&real)? & BY_OTHERS != 0 {
        return Some(path.to_owned());
    }
    let folder = real.parent()?;
    (mode(folder)? & (BY_OTHERS | STICKY) == BY_OTHERS).then(|| folder.to_owned())
}

fn check_identity_rules(rules: &Rules, tls: Option<&ServerTls>) -> Result<(), AccessError> {
    let asks = tls.is_some_and(ServerTls::requests_certificates);
    if rules.use_identities() && !asks {
        return Err(AccessError::IdentityWithoutCa);
    }
    Ok(())
}

/// Describes how, and to which clients, exports are served.
pub(crate) fn describe_access(policy: &Policy) -> String {
    let how = match &policy.tls {
        Some(tls) if tls.requires_certificates() => "over TLS with certificates",
        Some(_) => "over TLS",
        None => "without TLS",
    };
    format!("{how} to {}", policy.rules)
}

/// Warns about settings that are valid but probably not intended.
pub(crate) fn warn_risky(config: &Config, policy: &Policy) {
    if config.insecure_no_tls {
        tracing::warn!(
            reason = "no_tls",
            "TLS is off: traffic can be read and modified in transit"
        );
    }
    let exposed = config.listen.iter().find(|address| !address.is_local());
    if let Some(address) = exposed
        && policy.rules.is_local_only()
    {
        tracing::warn!(
            reason = "no_remote_clients",
            "listening on {address}, but the rules admit no other machine: use --allow or --rules"
        );
    }
    let vsock = config.listen.iter().find(|at| matches!(at, ListenAddress::Vsock { .. }));
    if let Some(address) = vsock
        && !policy.rules.may_admit_vsock()
    {
        tracing::warn!(
            reason = "no_vsock_clients",
            "listening on {address}, but the rules admit no virtual machine: use --allow \
             vsock:CID or --rules"
        );
    }
    if !config.proxies.is_empty() && policy.rules.is_local_only() {
        tracing::warn!(
            reason = "no_proxied_clients",
            "--proxy-from is set, but the rules admit no other machine: use --allow or --rules"
        );
    }
}
