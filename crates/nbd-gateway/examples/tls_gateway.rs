//! Serves two exports in memory over TLS.
//!
//!     cargo run -p nbd-gateway --example tls_gateway -- SERVER.PEM SERVER.KEY [CLIENT-CA.PEM]
//!     nbdinfo --list 'nbds://localhost?tls-certificates=FOLDER'
//!
//! `hexz-nbd pki` makes such files, and so does any other CA. With a CA for clients, each client
//! needs a certificate, and may come from anywhere; without one, only this machine is served.
//! Ctrl-C drains the requests in flight.

use std::error::Error;
use std::path::PathBuf;

use nbd_gateway::access::{CommandLineRules, Rules};
use nbd_gateway::config::Config;
use nbd_gateway::listen::{SocketPermissions, bind_all};
use nbd_gateway::tls::{self, ClientAuth, ClientAuthFiles, TlsFiles, TlsVersion};
use nbd_gateway::{CancellationToken, Gateway, Policy};
use nbd_server::{BytesExport, ExportSet};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(certificate), Some(key)) = (paths.next(), paths.next()) else {
        return Err("usage: tls_gateway SERVER.PEM SERVER.KEY [CLIENT-CA.PEM]".into());
    };
    let clients = paths.next().map(|authorities| ClientAuthFiles {
        authorities,
        revocation_lists: Vec::new(),
        auth: ClientAuth::Required,
    });
    // Any client that the CA vouches for; without a CA, the default: this machine only.
    let rules = match clients {
        Some(_) => CommandLineRules { allow_identity: vec!["*".parse()?], ..Default::default() },
        None => CommandLineRules::default(),
    };
    let rules = Rules::from_command_line(&rules);
    let (tls, warnings) =
        tls::load(&TlsFiles { certificate, key, clients }, TlsVersion::V1_2, None)?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    let policy = Policy { rules, tls: Some(tls) };

    // Without addresses, the NBD port is bound: on all addresses, or on loopback only.
    let config = Config::default();
    let loopback_only = policy.rules.is_local_only();
    let sockets = bind_all(&config.listen, loopback_only, &SocketPermissions::default())?;
    let exports = ExportSet::new([
        BytesExport::new("hello", &b"Hello over NBD and TLS!\n"[..]),
        BytesExport::new("sevens", vec![7; 1 << 20]),
    ]);
    let gateway = Gateway::new(sockets, config, policy, exports)?;
    for address in gateway.addresses()? {
        println!("listening on {address}");
    }

    let shutdown = CancellationToken::new();
    let on_interrupt = shutdown.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            on_interrupt.cancel();
        }
    });
    gateway.run(shutdown).await?;
    Ok(())
}
