//! Options for TLS.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nbd_gateway::tls::{ClientAuth, ClientAuthFiles, TlsFiles, TlsVersion};
use serde::Deserialize;

use super::from_file;

#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsOptions {
    /// Certificate of the server in PEM format, followed by its intermediate CAs. Clients must use
    /// TLS then
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate in PEM format (PKCS#8, PKCS#1 or SEC1)
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// CAs for client authentication, in PEM format: clients must present a certificate from one
    /// of them
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Revocation lists (CRLs) in PEM format [repeatable]. Each CA of a client's chain must have a
    /// list that hasn't expired; the newest list of a CA applies
    #[arg(long, value_name = "FILE")]
    #[serde(deserialize_with = "from_file::list")]
    tls_client_crl: Vec<PathBuf>,
    /// Client authentication
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    tls_client_auth: ClientAuthMode,
    /// Minimum TLS version. nbd-client 3.24 supports only 1.2
    #[arg(long, value_enum, value_name = "VERSION", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    tls_min: TlsMin,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum TlsMin {
    /// TLS 1.2, with forward-secret AEAD cipher suites only
    #[default]
    #[value(name = "1.2")]
    V1_2,
    /// TLS 1.3
    #[value(name = "1.3")]
    V1_3,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum ClientAuthMode {
    /// Clients must present a certificate
    #[default]
    Require,
    /// Clients may present a certificate, which must be valid
    Optional,
}

impl TlsOptions {
    pub(crate) fn files(&self) -> Option<(TlsFiles, TlsVersion)> {
        let oldest = match self.tls_min {
            TlsMin::V1_2 => TlsVersion::V1_2,
            TlsMin::V1_3 => TlsVersion::V1_3,
        };
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        let clients = self.tls_client_ca.clone().map(|authorities| ClientAuthFiles {
            authorities,
            revocation_lists: self.tls_client_crl.clone(),
            auth: match self.tls_client_auth {
                ClientAuthMode::Require => ClientAuth::Required,
                ClientAuthMode::Optional => ClientAuth::Optional,
            },
        });
        Some((TlsFiles { certificate, key, clients }, oldest))
    }
}
