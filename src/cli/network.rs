//! Who may connect, and where.

use clap::Args;
use hexz_nbd::gateway::access::{self, AccessList};
use hexz_nbd::gateway::listen::ListenAddress;

#[derive(Debug, Args)]
pub(crate) struct Network {
    /// Who may connect: networks such as 10.0.0.0/8 or 2001:db8::/32, or addresses
    /// [comma-separated, repeatable; default: this machine only]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Network")]
    allow: Vec<access::Network>,
    /// Who may not connect, even if allowed [comma-separated, repeatable]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Network")]
    deny: Vec<access::Network>,
    /// Where to listen: ADDRESS:PORT or unix:PATH [repeatable; default: port 10809 of
    /// every address, or of loopback if only this machine may connect]
    #[arg(long, value_name = "WHERE", help_heading = "Network")]
    pub(super) listen: Vec<ListenAddress>,
}

impl Network {
    pub(super) fn access(&self) -> AccessList {
        AccessList { allow: self.allow.clone(), deny: self.deny.clone() }
    }
}
