//! Temporary credentials: they are renewed while the gateway runs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use object_server::{CredentialServer, Issuer};

use super::serving::{permanent_issuer, signed_store};
use super::{MIB, WEB, gateway, pause, sample, store};
use crate::support::client::EIO;
use crate::support::pki::write_secret;
use crate::support::server::{Builder, Server, run};

fn with_endpoint(store: &object_server::ObjectServer) -> Builder {
    gateway().args(["--store-endpoint", &store.endpoint(), "s3://golden/web.hxz"])
}

/// Reads before and after the credentials have expired.
fn survives_expiry(builder: Builder, issuer: &Issuer) {
    let server = builder.start();
    let mut client = server.go("");
    sample().is_read_at(&mut client, 0);
    assert_eq!(issuer.issued(), 1);
    // Earlier than announced: the store's response says so.
    issuer.expire_all();
    sample().is_read_at(&mut client, 4 * MIB);
    assert_eq!(issuer.issued(), 2);
    sample().is_read(&mut client);
    assert_eq!(issuer.issued(), 2);
}

#[test]
fn credentials_of_a_container_are_renewed() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    let (store, service) = (signed_store(&issuer), CredentialServer::start(&issuer).unwrap());
    service.require_authorization("the token");
    let builder = with_endpoint(&store)
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.container_url())
        .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "the token");
    survives_expiry(builder, &issuer);
}

/// Kubernetes replaces the token file; the sandbox must allow to read it again.
#[test]
fn credentials_of_a_web_identity_are_renewed() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    let (store, service) = (signed_store(&issuer), CredentialServer::start(&issuer).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "first\n").unwrap();
    service.require_web_identity("first");
    let server = with_endpoint(&store)
        .env("AWS_WEB_IDENTITY_TOKEN_FILE", &token)
        .env("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        .env("AWS_ENDPOINT_URL_STS", service.endpoint())
        .start();
    let mut client = server.go("");
    sample().is_read_at(&mut client, 0);
    let renewed = folder.path().join("renewed");
    std::fs::write(&renewed, "second").unwrap();
    std::fs::rename(&renewed, &token).unwrap();
    service.require_web_identity("second");
    issuer.expire_all();
    sample().is_read(&mut client);
    assert_eq!(issuer.issued(), 2);
}

#[test]
fn credentials_of_an_instance_are_renewed() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    let (store, service) = (signed_store(&issuer), CredentialServer::start(&issuer).unwrap());
    let builder = with_endpoint(&store)
        .args(["--store-credentials", "instance"])
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint());
    survives_expiry(builder, &issuer);
}

/// The operator replaces the file, before or after the old keys are revoked.
#[test]
fn a_file_with_credentials_is_read_again() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    let store = signed_store(&issuer);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("credentials");
    let write = || {
        let it = issuer.issue();
        let (id, secret, token) =
            (it.access_key_id, it.secret_access_key, it.session_token.unwrap());
        let new = folder.path().join("new");
        let keys = format!(
            "[default]\naws_access_key_id={id}\naws_secret_access_key={secret}\n\
             aws_session_token={token}\n"
        );
        write_secret(&new, &keys);
        std::fs::rename(&new, &file).unwrap();
    };
    write();
    let server = with_endpoint(&store).arg("--store-credentials").arg(&file).start();
    let mut client = server.go("");
    sample().is_read_at(&mut client, 0);
    issuer.expire_all();
    write();
    sample().is_read(&mut client);
}

#[test]
fn credentials_of_an_http_server_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    for (content, header) in
        [("Bearer-Token-1\n", "Bearer Bearer-Token-1"), ("user:pass", "Basic dXNlcjpwYXNz")]
    {
        write_secret(&file, content);
        let store = super::store();
        let builder = super::gateway_of(&store).arg("-vvv").arg("--store-credentials").arg(&file);
        let mut server = builder.start();
        sample().is_read(&mut server.go(""));
        let requests = store.log().entries();
        assert!(requests.iter().all(|it| it.header("authorization") == Some(header)), "{header}");
        server.terminate();
        assert!(!server.log_text().contains("Bearer-Token-1"));
        assert!(!server.log_text().contains("dXNlcjpwYXNz"));
    }
}

#[test]
fn credentials_are_renewed_before_they_end() {
    let issuer = Issuer::new(Duration::from_secs(2));
    let (store, service) = (signed_store(&issuer), CredentialServer::start(&issuer).unwrap());
    let server = with_endpoint(&store)
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.container_url())
        .start();
    let mut client = server.go("");
    for part in 0..4 {
        sample().is_read_at(&mut client, part * 2 * MIB);
        pause(700);
    }
    let errors = store.log().totals().errors;
    assert!(errors <= 1, "{errors} requests with expired credentials");
}

/// The service that issues them is down: reads wait for it, as for the store.
#[test]
fn credentials_that_cannot_be_renewed_for_a_while() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    let (store, service) = (signed_store(&issuer), CredentialServer::start(&issuer).unwrap());
    let server = with_endpoint(&store)
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.container_url())
        .args(["--store-timeout", "2s"])
        .start();
    let mut client = server.go("");
    sample().is_read_at(&mut client, 0);
    service.stop();
    issuer.expire_all();
    assert_eq!(client.read(4 * MIB, 4096), Err(EIO));
    sample().is_read_at(&mut client, 0);
    let line = server.wait_for_reason("store_down");
    assert!(line.message().contains("credentials"), "{}", line.text);
    // It is back.
    service.restart().unwrap();
    let mut read = client.read(4 * MIB, 4096);
    for _ in 0..20 {
        if read.is_ok() {
            break;
        }
        pause(200);
        read = client.read(4 * MIB, 4096);
    }
    assert!(read.as_deref() == Ok(sample().part(4 * MIB, 4096)), "{:?}", read.err());
}

/// Files with secrets that every user of the machine can read.
#[test]
fn exposed_credentials_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    // Otherwise, others might not reach the files.
    set(folder.path(), 0o755);
    let file = folder.path().join("credentials");
    let store = store();
    let http = || gateway().arg("--store-credentials").arg(&file).arg(store.url(WEB));
    fs::write(&file, "user:s3cret").unwrap();
    set(&file, 0o644);
    let message = http().fails_with(2, "secret_exposed");
    assert!(message.contains("chmod 600") && !message.contains("s3cret"), "{message}");
    let file_name = file.to_str().unwrap();
    let ended = run(["verify", "--store-credentials", file_name, &store.url(WEB)]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("secret_exposed"), "{}", ended.stderr);
    let args = ["--json", "--store-credentials", file_name, "--store", &store.url(WEB)];
    let ended = run([&["doctor"], &args[..]].concat());
    assert!(ended.stdout.contains("secret_exposed"), "{}", ended.stdout);
    assert_eq!(store.log().totals().requests, 0);
    set(&file, 0o640);
    sample().is_read_at(&mut http().start().go(""), 0);

    let signed = signed_store(&permanent_issuer());
    let keys = "[default]\naws_access_key_id = AKIATESTTESTTEST\n\
                aws_secret_access_key = a+secret/key\n";
    fs::write(&file, keys).unwrap();
    let s3 = || {
        let args = ["--store-endpoint", &signed.endpoint(), "--store-credentials", file_name];
        gateway().args(args).arg("s3://golden/web.hxz")
    };
    set(&file, 0o666);
    s3().fails_with(2, "secret_exposed");
    set(&file, 0o600);
    sample().is_read_at(&mut s3().start().go(""), 0);

    // Only the file with the keys matters.
    set(&file, 0o644);
    let config = folder.path().join("config");
    fs::write(&config, "[default]\nregion = us-east-1\n").unwrap();
    set(&config, 0o644);
    let profile = || {
        gateway()
            .args(["--store-endpoint", &signed.endpoint()])
            .env("AWS_SHARED_CREDENTIALS_FILE", &file)
            .env("AWS_CONFIG_FILE", &config)
            .arg("s3://golden/web.hxz")
    };
    profile().fails_with(2, "secret_exposed");
    set(&file, 0o600);
    sample().is_read_at(&mut profile().start().go(""), 0);
}

/// A configuration file is often readable by all, which is right unless it contains secrets.
#[test]
fn a_readable_configuration_with_a_secret_causes_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    set(folder.path(), 0o755);
    let config = folder.path().join("gateway.toml");
    let store = store();
    let args = ["--traces", "off", "--config", config.to_str().unwrap()];
    for (query, mode, warns) in
        [("?sig=s3cret", 0o644, true), ("?sig=s3cret", 0o640, false), ("", 0o644, false)]
    {
        fs::write(&config, format!("[exports]\nweb = \"{}{query}\"\n", store.url(WEB))).unwrap();
        set(&config, mode);
        let server = Server::builder().args(args).start();
        sample().is_read_at(&mut server.go("web"), 0);
        assert_eq!(server.has_reason("secret_exposed"), warns, "{}", server.log_text());
        assert!(!server.log_text().contains("s3cret"), "{}", server.log_text());
    }
}
