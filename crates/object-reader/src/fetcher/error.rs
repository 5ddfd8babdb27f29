//! Failures of reads.

use std::sync::Arc;
use std::time::Duration;

use crate::store::{StoreError, StoreErrorKind};

/// Failure to open, check or read an object. The message names the object.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The store can't be reached, or doesn't work.
    #[error("{object}: the store is down: {message}; check it and the network")]
    Down {
        /// Object that was to be read.
        object: Arc<str>,
        /// Last failure.
        message: String,
    },
    /// The store is too slow.
    #[error("{object}: no response within {waited:?}: {message}; check the store and the network")]
    TimedOut {
        /// Object that was to be read.
        object: Arc<str>,
        /// Time that was waited.
        waited: Duration,
        /// Last failure.
        message: String,
    },
    /// The store asks for fewer requests.
    #[error("{object}: throttled by the store: {message}; reduce the load, or raise its limits")]
    Throttled {
        /// Object that was to be read.
        object: Arc<str>,
        /// Last failure.
        message: String,
    },
    /// The object has been replaced since it was opened.
    #[error("{object}: replaced in the store while in use; open it again")]
    Changed {
        /// Object that was to be read.
        object: Arc<str>,
    },
    /// There is no such object.
    #[error("{object}: not found: {message}; check the name, and whether it was deleted")]
    Gone {
        /// Object that was to be read.
        object: Arc<str>,
        /// Response of the store.
        message: String,
    },
    /// The store denies access.
    #[error("{object}: access denied: {message}; check the credentials and their permissions")]
    Denied {
        /// Object that was to be read.
        object: Arc<str>,
        /// Response of the store.
        message: String,
    },
    /// The credentials have expired and couldn't be renewed.
    #[error("{object}: the credentials have expired: {message}; renew them")]
    CredentialsExpired {
        /// Object that was to be read.
        object: Arc<str>,
        /// Response of the store.
        message: String,
    },
    /// The clock differs too much from that of the store.
    #[error("{object}: rejected because of the time: {message}; set the clock")]
    ClockSkew {
        /// Object that was to be read.
        object: Arc<str>,
        /// Response of the store.
        message: String,
    },
    /// The store can't be used.
    #[error("{object}: the store can't be used: {message}")]
    Unsupported {
        /// Object that was to be read.
        object: Arc<str>,
        /// What is missing.
        message: String,
    },
    /// The bytes aren't those that they should be, also after a second request.
    #[error(
        "{object}: wrong bytes at offset {offset}, twice; check the object, and caches before the store"
    )]
    Corrupt {
        /// Object that was to be read.
        object: Arc<str>,
        /// Offset of the chunk.
        offset: u64,
    },
    /// The range isn't part of the object.
    #[error("{object}: bytes up to {end} were requested, but there are {length}")]
    OutOfRange {
        /// Object that was to be read.
        object: Arc<str>,
        /// End of the range.
        end: u64,
        /// Length of the object.
        length: u64,
    },
    /// The fetcher is shutting down.
    #[error("{object}: not read: shutting down")]
    ShuttingDown {
        /// Object that was to be read.
        object: Arc<str>,
    },
}

impl FetchError {
    /// Describes a failed request.
    pub(crate) fn from_store(object: &Arc<str>, error: StoreError, waited: Duration) -> Self {
        let (object, message) = (Arc::clone(object), error.message);
        match error.kind {
            StoreErrorKind::Unreachable
            | StoreErrorKind::NeverReached
            | StoreErrorKind::Interrupted
            | StoreErrorKind::ServerError => Self::Down { object, message },
            StoreErrorKind::TimedOut => Self::TimedOut { object, waited, message },
            StoreErrorKind::Throttled => Self::Throttled { object, message },
            StoreErrorKind::CredentialsExpired => Self::CredentialsExpired { object, message },
            StoreErrorKind::Denied => Self::Denied { object, message },
            StoreErrorKind::ClockSkew => Self::ClockSkew { object, message },
            StoreErrorKind::Changed => Self::Changed { object },
            StoreErrorKind::NotFound => Self::Gone { object, message },
            StoreErrorKind::Unsupported => Self::Unsupported { object, message },
        }
    }

    /// Returns the name of the object, with which the message starts.
    pub fn object(&self) -> &str {
        match self {
            Self::Down { object, .. }
            | Self::TimedOut { object, .. }
            | Self::Throttled { object, .. }
            | Self::Changed { object }
            | Self::Gone { object, .. }
            | Self::Denied { object, .. }
            | Self::CredentialsExpired { object, .. }
            | Self::ClockSkew { object, .. }
            | Self::Unsupported { object, .. }
            | Self::Corrupt { object, .. }
            | Self::OutOfRange { object, .. }
            | Self::ShuttingDown { object } => object,
        }
    }

    /// Returns the stable label for logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Down { .. } => "down",
            Self::TimedOut { .. } => "timed_out",
            Self::Throttled { .. } => "throttled",
            Self::Changed { .. } => "changed",
            Self::Gone { .. } => "gone",
            Self::Denied { .. } => "denied",
            Self::CredentialsExpired { .. } => "credentials_expired",
            Self::ClockSkew { .. } => "clock_skew",
            Self::Unsupported { .. } => "unsupported",
            Self::Corrupt { .. } => "corrupt",
            Self::OutOfRange { .. } => "out_of_range",
            Self::ShuttingDown { .. } => "shutting_down",
        }
    }

    /// Returns true if the same read may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Down { .. } | Self::TimedOut { .. } | Self::Throttled { .. })
    }

    /// Returns true if the store fails, or rejects requests because of the credentials or the clock.
    /// Neither says anything about the object.
    pub fn is_outage(&self) -> bool {
        let is_rejected = matches!(
            self,
            Self::Denied { .. } | Self::CredentialsExpired { .. } | Self::ClockSkew { .. }
        );
        is_rejected || self.is_transient()
    }

    /// Returns true if the failure leaves open whether the object still has the version that it had.
    /// A reader of that version can go on with it.
    pub fn is_inconclusive(&self) -> bool {
        !matches!(self, Self::Changed { .. } | Self::Gone { .. })
    }
}
