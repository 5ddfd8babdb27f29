//! `hexz-nbd demo`: serves a built-in snapshot and reads it back, without any setup.

mod pki;
mod reader;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use hexz_exports::{BlockReader, Catalog};
use hexz_reader::storage::Storage;
use hexz_reader::{OpenOptions, Snapshot};
use nbd_gateway::access::Rules;
use nbd_gateway::audit::Audit;
use nbd_gateway::config::{Config, Limits, Timeouts};
use nbd_gateway::listen::{self, ListenAddress, NBD_PORT};
use nbd_gateway::tls::{self, ServerTls, TlsFiles, TlsVersion};
use nbd_gateway::{Gateway, Policy};
use nbd_telemetry::escape;

use crate::cli::Demo;
use crate::commands::output;
use crate::exit_status::{self, ExitStatus, Failure};
use crate::service::access::AccessError;
use crate::service::runtime;

/// Archive of an ext4 file system of 8 MiB, packed by the Hexz tools.
static SNAPSHOT: &[u8] = include_bytes!("../../../tests/archives/base-zstd.hxz");
/// SHA-256 of the image in the archive.
const IMAGE_SHA256: &str = "f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c";
const NAME: &str = "demo.hexz";

#[derive(Debug, thiserror::Error)]
#[error("the demo failed: {0}")]
struct DemoError(String);

impl ExitStatus for DemoError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        "demo_failed"
    }
}

/// Prints a line to the standard output. Returns from the caller if that fails.
macro_rules! print_line {
    ($($words:tt)*) => { output::print(format!("{}\n", format_args!($($words)*)))? };
}

/// Creates a PKI, serves the snapshot and reads it back. Continues to serve unless `--once` is set.
pub(crate) fn run(options: &Demo) -> Result<(), Failure> {
    // Deleted with its contents when this function returns.
    let folder = tempfile::Builder::new().prefix("hexz-nbd-demo-").tempdir()?;
    let authority = pki::create(folder.path()).map_err(failed)?;
    print_line!("1. Created a temporary CA, and a server certificate for localhost:");
    print_line!("     {}", escape::name(folder.path()));

    let files = TlsFiles {
        certificate: folder.path().join("server-cert.pem"),
        key: folder.path().join("server-key.pem"),
        clients: None,
    };
    let (tls, _) = tls::load(&files, TlsVersion::default(), None).map_err(AccessError::from)?;
    let storage: Arc<dyn Storage> = Arc::new(Arc::<[u8]>::from(SNAPSHOT));
    let open = OpenOptions::default();
    let snapshot = Snapshot::from_storage(Path::new(NAME), storage, &open)?;
    let reader = BlockReader::new(64 * 1024 * 1024);
    let exports = Catalog::with_snapshot(NAME, snapshot, open, reader);

    runtime::run_until_signal(runtime::prepare(), &mut None, async |shutdown| {
        let (gateway, address) = bind(tls, exports)?;
        let port = address.port();
        print_line!("2. Serving the built-in snapshot over TLS on loopback:");
        print_line!("     {NAME}, an archive of {} bytes, on port {port}", SNAPSHOT.len());

        let stop = shutdown.child_token();
        let serving = tokio::spawn(gateway.run(stop.clone()));
        let read = reader::read_all(address, NAME, authority).await.map_err(failed)?;
        if read.sha256 != IMAGE_SHA256 {
            let message = format!("read SHA-256 {}, expected {IMAGE_SHA256}", read.sha256);
            return Err(DemoError(message).into());
        }
        print_line!("3. Read all of it with a TLS client, and verified:");
        print_line!("     the server's certificate against the CA, for the name localhost");
        print_line!("     {}", read.tls);
        print_line!("     the export: {}", read.description);
        print_line!("     the content: {} bytes, SHA-256 {}", read.size, read.sha256);
        print_line!("     a read past the end is rejected, and the session continues");

        if options.once {
            stop.cancel();
        } else {
            print_commands(port, folder.path())?;
        }
        Ok(serving.await.map_err(failed)??)
    })
}

fn failed(error: impl ToString) -> Failure {
    DemoError(error.to_string()).into()
}

/// Listens on the NBD port of loopback, or on a free port if that one is in use.
fn bind(tls: ServerTls, exports: Catalog) -> Result<(Gateway<Catalog>, SocketAddr), Failure> {
    let sockets = vec![match listen::bind_loopback(NBD_PORT) {
        Ok(socket) => socket,
        Err(_) => listen::bind_loopback(0)?,
    }];
    let config = Config {
        listen: Vec::new(),
        proxies: Vec::new(),
        insecure_no_tls: false,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
        audit: Audit::disabled(),
    };
    let policy = Policy { rules: Rules::default(), tls: Some(tls) };
    let gateway = Gateway::new(sockets, config, policy, exports)?;
    match gateway.addresses()?.first() {
        Some(ListenAddress::Tcp(address)) => Ok((gateway, *address)),
        _ => Err(failed("no listener")),
    }
}

fn print_commands(port: u16, folder: &Path) -> Result<(), Failure> {
    let uri = format!("nbds://localhost:{port}/{NAME}?tls-certificates={}", escape::name(folder));
    let qemu = format!(
        "--object tls-creds-x509,id=tls,endpoint=client,dir={} \\\n         --image-opts \
         driver=nbd,host=localhost,port={port},export={NAME},tls-creds=tls",
        escape::name(folder)
    );
    print_line!("4. Serving until Ctrl-C. In another terminal, try:");
    print_line!("     nbdinfo '{uri}'");
    print_line!("     nbdcopy '{uri}' demo.img");
    print_line!("     qemu-img info {qemu}");
    print_line!("     sudo nbd-client localhost {port} /dev/nbd0 -N {NAME} -x \\");
    print_line!("         -A {} -H localhost", escape::name(&folder.join("ca-cert.pem")));
    print_line!("         then: sudo mount -o ro,noload /dev/nbd0 /mnt; cat /mnt/HELLO");
    print_line!("         after: sudo umount /mnt; sudo nbd-client -d /dev/nbd0");
    Ok(())
}
