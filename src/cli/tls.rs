//! With which certificates.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hexz_nbd::gateway::tls::{TlsFiles, TlsVersion};

#[derive(Debug, Args)]
pub(crate) struct Tls {
    /// The server's certificate in PEM form, followed by those that lead to its root.
    /// With it TLS is required
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "TLS")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM form (PKCS#8, PKCS#1 or SEC1)
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "TLS")]
    tls_key: Option<PathBuf>,
    /// The oldest TLS version to speak. nbd-client 3.24 speaks 1.2 only
    #[arg(long, value_enum, value_name = "VERSION", default_value_t, help_heading = "TLS")]
    tls_min: TlsMin,
    /// Serve other machines without TLS: anyone on the way can read and change everything
    #[arg(long, conflicts_with = "tls_cert", help_heading = "TLS")]
    pub(super) insecure_no_tls: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum TlsMin {
    /// TLS 1.2, with its forward-secret AEAD suites alone
    #[default]
    #[value(name = "1.2")]
    V1_2,
    /// TLS 1.3
    #[value(name = "1.3")]
    V1_3,
}

impl Tls {
    pub(crate) fn files(&self) -> Option<(TlsFiles, TlsVersion)> {
        let oldest = match self.tls_min {
            TlsMin::V1_2 => TlsVersion::V1_2,
            TlsMin::V1_3 => TlsVersion::V1_3,
        };
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        Some((TlsFiles { certificate, key }, oldest))
    }
}
