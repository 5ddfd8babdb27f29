//! The subcommands, one module each, and `--check-config`.

pub(crate) mod check;
pub(crate) mod check_config;
pub(crate) mod completions;
pub(crate) mod demo;
pub(crate) mod digest;
pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod output;
pub(crate) mod pki;
pub(crate) mod top;
pub(crate) mod verify;
