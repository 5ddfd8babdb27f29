//! Options for archives in object stores. Without the feature `remote`, there are none.

#[cfg(feature = "remote")]
mod remote;

#[cfg(feature = "remote")]
pub(crate) use remote::{
    DiskCacheOptions, ReadyWhen, SecretUrl, SecretUrls, StoreOptions, StoreSettings, StoreStyle,
    StoreToCheck, TraceOptions,
};

/// No options: this build has no support for object stores.
#[cfg(not(feature = "remote"))]
#[derive(Debug, Default, Clone, clap::Args, serde::Deserialize)]
pub(crate) struct StoreOptions {}

/// No options: this build has no support for object stores.
#[cfg(not(feature = "remote"))]
#[derive(Debug, Default, Clone, clap::Args, serde::Deserialize)]
pub(crate) struct DiskCacheOptions {}
