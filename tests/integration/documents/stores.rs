//! The object stores of the pages, played by this program in the namespaces of a page.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use object_server::{Builder, Credentials, Issuer, ObjectServer};

use super::page::Step;

/// Returns true if a page has URLs of these stores.
pub fn are_used(steps: &[Step]) -> bool {
    let is_url =
        |text: &str| ["s3://", "gs://", "az://"].iter().any(|scheme| text.contains(scheme));
    steps.iter().any(|step| match step {
        Step::Run(command) => is_url(&command.text),
        Step::File { text, .. } => is_url(text),
        Step::Log { .. } | Step::NotRun { .. } => false,
    })
}

/// Returns the command that starts the stores, for a shell. It reads STORES, the folder with a
/// folder for each bucket, and CA, the file for the stores' CAs, which is written when they listen.
pub fn command() -> String {
    let own = std::env::current_exe().unwrap();
    format!("'{}' --exact documents::stores::play --ignored --nocapture", own.display())
}

/// AWS and MinIO, with signatures; Google Cloud and Azure, without.
#[test]
#[ignore = "runs until it is killed: machine.sh starts it"]
fn play() {
    let (Some(folder), Some(ca)) = (std::env::var_os("STORES"), std::env::var_os("CA")) else {
        return;
    };
    let issuer = Issuer::new(Duration::from_secs(3600));
    issuer.add(Credentials::permanent("AKIAEXAMPLE", "secret"));
    let start = |address: &str, settings: Builder| {
        let address: SocketAddr = address.parse().unwrap();
        settings.folder(&folder).https().address(address).start().unwrap()
    };
    let new = ObjectServer::builder;
    let aws = new().credentials(&issuer).base_domain("s3.eu-central-1.amazonaws.com");
    let minio = new().credentials(&issuer).name("minio.example.org");
    let others = ["storage.googleapis.com", "exampleaccount.blob.core.windows.net"];
    let servers = [
        start("192.0.2.30:443", aws),
        start("192.0.2.31:9000", minio),
        start("192.0.2.32:443", others.into_iter().fold(new(), Builder::name)),
    ];
    let certificates: String = servers.iter().filter_map(ObjectServer::ca_pem).collect();
    let unfinished = std::path::Path::new(&ca).with_extension("new");
    fs::write(&unfinished, certificates).unwrap();
    fs::rename(unfinished, ca).unwrap();
    loop {
        std::thread::park();
    }
}
