//! Every kind of store, with real clients.

use object_server::{Credentials, Issuer, ObjectServer};

use super::{WEB, gateway, gateway_of, other_sample, sample, store};
use crate::clients;
use crate::support::server::{Builder, Server};
use crate::support::wait_until;
use std::time::Duration;

const KEY: &str = "AKIATESTTESTTEST";
const SECRET: &str = "a+secret/key";

/// Serves the sample, reads it with a raw client, and copies it with nbdcopy.
fn is_served(builder: Builder, export: &str) -> Server {
    let server = builder.start();
    sample().is_read(&mut server.go(export));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy");
    let uri = format!("nbd://{}/{export}", server.address());
    let info = clients::run("nbdinfo", &["--json", &uri]).ok();
    assert!(info.contains(&format!("\"export-size\": {}", sample().image.len())), "{info}");
    clients::run("nbdcopy", &[&uri, file.to_str().unwrap()]).ok();
    assert!(std::fs::read(&file).unwrap() == sample().image, "nbdcopy copies other bytes");
    server
}

/// An S3 server with the sample as `golden/web.hxz`, which requires signatures.
pub(super) fn signed_store(issuer: &Issuer) -> ObjectServer {
    let store = ObjectServer::builder().credentials(issuer).start().unwrap();
    store.put("golden/web.hxz", sample().bytes());
    store
}

pub(super) fn permanent_issuer() -> Issuer {
    let issuer = Issuer::new(Duration::from_secs(3600));
    issuer.add(Credentials::permanent(KEY, SECRET));
    issuer
}

#[test]
fn plain_http() {
    let store = store();
    let mut server = is_served(gateway_of(&store), "web.hxz");
    // All bytes came once, though they were read twice; the ends are fetched for the header.
    let totals = store.log().totals();
    let length = sample().archive.bytes.len() as u64;
    assert!(totals.data_bytes <= length + 512 * 1024, "{totals:?}, {length}");
    assert_eq!(totals.errors, 0);
    assert_eq!(server.terminate().code(), Some(0));
}

#[test]
fn https_with_a_ca_file() {
    let store = ObjectServer::builder().https().start().unwrap();
    store.put(WEB, sample().bytes());
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, store.ca_pem().unwrap()).unwrap();
    is_served(gateway().arg("--store-ca").arg(&ca).arg(store.url(WEB)), "web.hxz");
}

/// A store whose certificate can't be verified isn't used, and doesn't stop the gateway for ever:
/// it counts as down.
#[test]
fn https_with_an_unknown_ca_is_refused() {
    let store = ObjectServer::builder().https().start().unwrap();
    store.put(WEB, sample().bytes());
    let other = ObjectServer::builder().https().start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, other.ca_pem().unwrap()).unwrap();
    let builder = gateway().arg("--store-ca").arg(&ca).args(["--store-timeout", "1s"]);
    let message = builder.arg("--strict").arg(store.url(WEB)).fail().1;
    assert!(message.contains("store_"), "{message}");
    assert_eq!(store.log().totals().requests, 0);
}

#[test]
fn s3_with_credentials_of_the_environment() {
    let store = signed_store(&permanent_issuer());
    let builder = gateway()
        .args(["--store-endpoint", &store.endpoint(), "web=s3://golden/web.hxz"])
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET);
    is_served(builder, "web");
    let requests = store.log().entries();
    assert!(requests.iter().all(|request| request.status < 300), "{requests:?}");
    assert!(requests[0].header("authorization").unwrap().contains("us-east-1/s3/aws4_request"));
}

#[test]
fn s3_without_credentials() {
    let store = ObjectServer::builder().s3().start().unwrap();
    store.put("golden/web.hxz", sample().bytes());
    let args = ["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"];
    is_served(gateway().args(args).arg("s3://golden/web.hxz"), "web.hxz");
    let requests = store.log().entries();
    assert!(requests.iter().all(|request| request.header("authorization").is_none()));
}

/// Two stores of one configuration file, each with credentials that the other one doesn't accept.
#[test]
fn stores_of_a_file_have_their_own_credentials() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = "sandbox = \"require\"\nstore-timeout = \"5s\"\ntraces = \"off\"\n".to_owned();
    let mut exports = "[exports]\n".to_owned();
    let mut tables = String::new();
    let mut stores = Vec::new();
    let archives = [("one", sample()), ("two", other_sample())];
    for (name, archive) in archives {
        let issuer = Issuer::new(Duration::from_secs(3600));
        issuer.add(Credentials::permanent(&format!("AKIA{name}"), &format!("secret-{name}")));
        let store = ObjectServer::builder().credentials(&issuer).start().unwrap();
        store.put(&format!("{name}/web.hxz"), archive.bytes());
        let file = folder.path().join(name);
        let keys =
            format!("aws_access_key_id = AKIA{name}\naws_secret_access_key = secret-{name}\n");
        crate::support::pki::write_secret(&file, &format!("[default]\n{keys}"));
        exports += &format!("{name} = \"s3://{name}/web.hxz\"\n");
        tables += &format!(
            "[stores.\"s3://{name}\"]\nstore-endpoint = \"{}\"\nstore-credentials = \"{}\"\n",
            store.endpoint(),
            file.display()
        );
        stores.push(store);
    }
    config += &format!("{exports}{tables}");
    let file = folder.path().join("hexz-nbd.toml");
    std::fs::write(&file, config).unwrap();
    let server = Server::builder().arg("--config").arg(&file).start();
    for (name, archive) in archives {
        archive.is_read(&mut server.go(name));
    }
    for store in &stores {
        assert_eq!(store.log().totals().errors, 0);
        assert!(store.log().totals().data_requests > 2);
    }
}

/// A gateway needs little more memory than its budget, whatever it reads.
#[test]
fn memory_is_bounded_while_a_larger_archive_is_read() {
    let large = super::Sample::new(7, 96 * super::MIB);
    let store = ObjectServer::builder().start().unwrap();
    store.put(WEB, large.bytes());
    let server = gateway_of(&store).args(["--cache-size", "32MiB"]).start();
    let mut client = server.go("");
    large.is_read(&mut client);
    large.is_read_at(&mut client, 0);
    let peak = server.peak_rss_kib() / 1024;
    assert!(peak < 32 + 64, "{peak} MiB");
    // Nothing is leaked when the clients have left.
    client.disconnect();
    wait_until("connections are closed", || server.fd_count() < 120);
}
