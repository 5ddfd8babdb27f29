//! Landlock: restricts which files can be opened or removed, and which network connections can be
//! made.

use std::fmt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};

use nbd_telemetry::escape;

use super::SandboxNote;
use super::paths::AllowedPaths;

/// Newest ABI that has been tested. An older kernel enforces what it supports: files from ABI 1,
/// TCP from ABI 4, signals and abstract sockets from ABI 6. Seccomp refuses in another way what an
/// older ABI doesn't cover of these.
const ABI_TRIED: ABI = ABI::V7;

/// Restrictions that were applied.
#[derive(Debug)]
pub(super) struct AppliedLandlock {
    abi: i32,
    /// Folders and files that could not be allowed, and the reasons.
    pub(super) not_allowed: Vec<SandboxNote>,
}

/// Restricts this thread and the threads that it starts. They may read only what is in `readable`
/// and append only where it says so, may connect further TCP sockets to `ports` only, and may not
/// run programs or bind TCP sockets.
pub(super) fn restrict(readable: &AllowedPaths, ports: &[u16]) -> Result<AppliedLandlock, String> {
    let mut not_allowed = Vec::new();
    let status = apply(readable, ports, &mut not_allowed).map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("disabled in the kernel".to_owned())
        }
        (RulesetStatus::NotEnforced, _) => Err("not supported by the kernel".to_owned()),
        (_, LandlockStatus::Available { effective_abi, kernel_abi }) => {
            Ok(AppliedLandlock { abi: kernel_abi.unwrap_or(effective_abi as i32), not_allowed })
        }
        _ => Err("unknown version".to_owned()),
    }
}

fn apply(
    readable: &AllowedPaths,
    ports: &[u16],
    not_allowed: &mut Vec<SandboxNote>,
) -> Result<RestrictionStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_TRIED))?
        .handle_access(AccessNet::from_all(ABI_TRIED))?
        .scope(Scope::from_all(ABI_TRIED))?
        .create()?;
    let mut allow = |rules: RulesetCreated, path: &PathBuf, access: BitFlags<AccessFs>| {
        allow(rules, path, access, not_allowed)
    };
    for folder in &readable.folders {
        rules = allow(rules, folder, AccessFs::ReadFile | AccessFs::ReadDir)?;
    }
    for file in &readable.files {
        rules = allow(rules, file, AccessFs::ReadFile.into())?;
    }
    for folder in &readable.appendable {
        rules = allow(rules, folder, AccessFs::WriteFile | AccessFs::MakeReg)?;
    }
    for file in &readable.appendable_files {
        rules = allow(rules, file, AccessFs::WriteFile.into())?;
    }
    for folder in &readable.removable {
        rules = allow(rules, folder, AccessFs::RemoveFile.into())?;
    }
    for port in ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    rules.restrict_self()
}

fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
    not_allowed: &mut Vec<SandboxNote>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(place) => rules.add_rule(PathBeneath::new(place, access)),
        Err(error) => {
            let text = format!("access to {} can't be allowed: {error}", escape::path(path));
            not_allowed.push(SandboxNote::new("path_not_allowed", text));
            Ok(rules)
        }
    }
}

impl AppliedLandlock {
    /// Returns true if the ports of TCP connections are restricted.
    pub(super) fn restricts_tcp(&self) -> bool {
        self.abi >= 4
    }
}

impl fmt::Display for AppliedLandlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.abi {
            ..4 => "files",
            4 | 5 => "files, TCP",
            _ => "files, TCP, signals",
        };
        write!(f, "Landlock (ABI {}: {what})", self.abi)
    }
}
