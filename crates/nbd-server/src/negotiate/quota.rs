//! Limits on the options that one client may send.

use crate::SessionError;

/// Limits on the options that one client may send, in plaintext and inside TLS together. An option
/// may cost the server more than the client, as LIST does in a large folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NegotiationLimits {
    /// Number of options, including ABORT and those that are refused.
    pub options: u32,
    /// Bytes of option data.
    pub option_bytes: u64,
}

impl Default for NegotiationLimits {
    /// Returns limits that suffice for a client that queries hundreds of exports one by one, as
    /// `nbdinfo --list` does.
    fn default() -> Self {
        Self { options: 4096, option_bytes: 1024 * 1024 }
    }
}

impl NegotiationLimits {
    /// Returns the full quota of a new client.
    pub fn quota(self) -> NegotiationQuota {
        NegotiationQuota { limits: self, left: self }
    }
}

/// Remainder of one client's negotiation limits.
#[derive(Debug, Clone)]
pub struct NegotiationQuota {
    limits: NegotiationLimits,
    left: NegotiationLimits,
}

impl NegotiationQuota {
    /// Charges an option with `length` bytes of data, before the data is read.
    ///
    /// # Errors
    /// The client exceeds one of the limits.
    pub(super) fn charge(&mut self, length: u32) -> Result<(), SessionError> {
        let NegotiationLimits { options, option_bytes } = &mut self.left;
        match options.checked_sub(1) {
            Some(left) => *options = left,
            None => return Err(SessionError::TooManyOptions(self.limits.options)),
        }
        match option_bytes.checked_sub(length.into()) {
            Some(left) => *option_bytes = left,
            None => return Err(SessionError::TooManyOptionBytes(self.limits.option_bytes)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quota_can_be_used_up_exactly() {
        let mut quota = NegotiationLimits { options: 3, option_bytes: 100 }.quota();
        assert!(quota.charge(0).is_ok() && quota.charge(60).is_ok());
        let mut other = quota.clone();
        assert!(matches!(other.charge(41), Err(SessionError::TooManyOptionBytes(100))));
        assert!(quota.charge(40).is_ok());
        assert!(matches!(quota.charge(0), Err(SessionError::TooManyOptions(3))));
    }
}
