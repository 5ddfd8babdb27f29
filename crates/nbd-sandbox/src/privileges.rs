//! User, groups and capabilities of the process.

use std::fmt;
use std::str::FromStr;

use nix::unistd::{self, Gid, Group, Uid, getgroups, getresgid, getresuid};
use rustix::io;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// A user and group to switch to: `USER` or `USER:GROUP`, by name or number. Without a group, the
/// user's own is used. Supplementary groups are dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
    /// Text that it was parsed from.
    text: String,
}

/// Reason why a text doesn't name a user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// There is no such user.
    #[error("no user named {:?}", nbd_telemetry::escape::name(.0))]
    NoUser(String),
    /// There is no such group.
    #[error("no group named {:?}", nbd_telemetry::escape::name(.0))]
    NoGroup(String),
    /// The user is given by an unknown number, so its group has to be given too.
    #[error("no user with the number {0}: add a group, as in {0}:GROUP")]
    GroupMissing(u32),
    /// The user database can't be read.
    #[error("can't look up {name:?}: {1}", name = nbd_telemetry::escape::name(.0))]
    Lookup(String, String),
}

impl FromStr for User {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let lookup = |error: nix::Error| UserError::Lookup(text.to_owned(), error.to_string());
        let named = unistd::User::from_name(user).map_err(lookup)?;
        let (uid, own_group) = match (named, user.parse()) {
            (Some(user), _) => (user.uid, Some(user.gid)),
            (None, Ok(number)) => {
                let uid = Uid::from_raw(number);
                (uid, unistd::User::from_uid(uid).map_err(lookup)?.map(|user| user.gid))
            }
            (None, Err(_)) => return Err(UserError::NoUser(user.to_owned())),
        };
        let gid = match (group, own_group) {
            (None, Some(gid)) => gid,
            (None, None) => return Err(UserError::GroupMissing(uid.as_raw())),
            (Some(group), _) => match (Group::from_name(group).map_err(lookup)?, group.parse()) {
                (Some(group), _) => group.gid,
                (None, Ok(number)) => Gid::from_raw(number),
                (None, Err(_)) => return Err(UserError::NoGroup(group.to_owned())),
            },
        };
        Ok(Self { uid, gid, text: text.to_owned() })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl User {
    /// Switches the process to this user irrevocably, and verifies that.
    pub(super) fn switch_to(&self) -> Result<(), String> {
        let is_it = || -> nix::Result<bool> {
            let (uids, gids) = (getresuid()?, getresgid()?);
            Ok([uids.real, uids.effective, uids.saved].iter().all(|uid| *uid == self.uid)
                && [gids.real, gids.effective, gids.saved].iter().all(|gid| *gid == self.gid))
        };
        let failed = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
        if !self.uid.is_root() && is_it().map_err(failed("getresuid"))? {
            return Ok(());
        }
        if !unistd::geteuid().is_root() {
            return Err("only root can switch to another user".to_owned());
        }
        // In this order, because each step needs root.
        unistd::setgroups(&[]).map_err(failed("setgroups"))?;
        unistd::setresgid(self.gid, self.gid, self.gid).map_err(failed("setresgid"))?;
        unistd::setresuid(self.uid, self.uid, self.uid).map_err(failed("setresuid"))?;

        let root = Uid::from_raw(0);
        let is_done = is_it().map_err(failed("getresuid"))?
            && getgroups().is_ok_and(|groups| groups.is_empty())
            && (self.uid.is_root()
                || unistd::setresuid(root, root, root).is_err()
                    && capabilities(None).is_ok_and(|held| held.permitted.is_empty()));
        if is_done { Ok(()) } else { Err("root privileges were not dropped".to_owned()) }
    }
}

/// Returns true if the process runs as root.
pub fn is_root() -> bool {
    unistd::geteuid().is_root()
}

/// Returns the capabilities of a gateway: to read any file and, if a socket has to be removed at
/// exit, to write to any folder.
pub(super) fn gateway_capabilities(removes_sockets: bool) -> CapabilitySet {
    let mut kept = CapabilitySet::DAC_READ_SEARCH;
    if removes_sockets {
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    kept
}

/// Drops all capabilities except those in `kept`, of which only those that the process holds stay.
pub(super) fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let held = capabilities(None)?;
    let left = CapabilitySets {
        effective: held.effective & kept,
        permitted: held.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    // Without capabilities there is nothing to drop, and the call needn't be permitted.
    if left == held {
        return Ok(());
    }
    set_capabilities(None, left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_parsed_by_name_and_number() {
        let user =
            |text: &str| text.parse::<User>().map(|user| (user.uid.as_raw(), user.gid.as_raw()));
        assert_eq!(user("root"), Ok((0, 0)));
        assert_eq!(user("0"), Ok((0, 0)));
        assert_eq!(user("root:daemon"), Ok((0, 1)));
        assert_eq!(user("4000000:4000001"), Ok((4_000_000, 4_000_001)));
        assert_eq!(user("4000000"), Err(UserError::GroupMissing(4_000_000)));
        for nobody in ["", "no such user", "-1", "4294967296", ":root"] {
            assert!(matches!(user(nobody), Err(UserError::NoUser(_))), "{nobody}");
        }
        for nothing in ["root:", "root:no such group", "root:-1"] {
            assert!(matches!(user(nothing), Err(UserError::NoGroup(_))), "{nothing}");
        }
    }
}
