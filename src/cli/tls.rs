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
    /// The server's certificate in PEM form, followed by those that lead to its root.
    /// With it TLS is required
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM form (PKCS#8, PKCS#1 or SEC1)
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The CAs of clients, in PEM form: clients have to show a certificate that one of them
    /// signed
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Certificates that have been revoked, in PEM form [repeatable]. Each CA between a
    /// client and its root has to have a list that hasn't run out; of several lists of one CA
    /// the newest counts
    #[arg(long, value_name = "FILE")]
    #[serde(deserialize_with = "from_file::list")]
    tls_client_crl: Vec<PathBuf>,
    /// Whether clients have to have a certificate
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    tls_client_auth: ClientAuthMode,
    /// The oldest TLS version to speak. nbd-client 3.24 speaks 1.2 only
    #[arg(long, value_enum, value_name = "VERSION", default_value_t)]
    #[serde(deserialize_with = "from_file::choice")]
    tls_min: TlsMin,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum TlsMin {
    /// TLS 1.2, with its forward-secret AEAD suites alone
    #[default]
    #[value(name = "1.2")]
    V1_2,
    /// TLS 1.3
    #[value(name = "1.3")]
    V1_3,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum ClientAuthMode {
    /// They have to
    #[default]
    Require,
    /// They needn't, but one that they show has to be good
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
