//! Requests that a store denies: the label tells wrong permissions from a wrong clock.

use object_server::{Behavior, Credentials, Issuer, Script};

use super::serving::{permanent_issuer, signed_store};
use super::{MIB, gateway, gateway_of, sample, store};
use crate::support::client::EIO;
use std::time::Duration;

/// Returns the message of a gateway that can't start with a store which always responds like that.
#[track_caller]
fn is_denied(behavior: Behavior, label: &str) -> String {
    let store = signed_store(&permanent_issuer());
    store.set_script(Script::always(behavior));
    gateway()
        .args(["--strict", "--store-timeout", "2s", "--store-endpoint", &store.endpoint()])
        .arg("s3://golden/web.hxz")
        .env("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
        .env("AWS_SECRET_ACCESS_KEY", "a+secret/key")
        .fails_with(3, label)
}

#[test]
fn access_is_denied() {
    is_denied(Behavior::status(403), "store_denied");
}

#[test]
fn the_clock_is_wrong() {
    let message = is_denied(Behavior::error(403, "RequestTimeTooSkewed"), "store_clock_skew");
    assert!(message.contains("clock"), "{message}");
}

#[test]
fn permanent_credentials_have_expired() {
    is_denied(Behavior::expired_token(), "store_credentials");
}

#[test]
fn a_signature_is_wrong() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    issuer.add(Credentials::permanent("AKIATESTTESTTEST", "another secret"));
    let store = signed_store(&issuer);
    let message = gateway()
        .args(["--strict", "--store-endpoint", &store.endpoint(), "s3://golden/web.hxz"])
        .env("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
        .env("AWS_SECRET_ACCESS_KEY", "a+secret/key")
        .fails_with(3, "store_denied");
    assert!(!message.contains("a+secret/key"), "{message}");
}

#[test]
fn credentials_that_are_missing_are_an_error_of_the_configuration() {
    let store = signed_store(&permanent_issuer());
    let builder = gateway().args(["--store-endpoint", &store.endpoint()]);
    builder.env("HOME", "/nonexistent").arg("s3://golden/web.hxz").fails_with(2, "invalid_store");
    assert_eq!(store.log().totals().requests, 0);
}

/// Plain HTTP to other machines needs an option.
#[test]
fn plain_http_to_other_machines_is_refused() {
    let url = "http://192.0.2.1/web.hxz";
    gateway().arg(url).fails_with(2, "invalid_store");
}

/// Permissions that are taken away while clients read, and given back.
#[test]
fn access_is_denied_in_between() {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1ms", "--store-timeout", "2s"]).start();
    let mut client = server.go("");
    for (behavior, label) in [
        (Behavior::status(403), "store_denied"),
        (Behavior::error(403, "RequestTimeTooSkewed"), "store_"),
        (Behavior::expired_token(), "store_"),
    ] {
        store.set_script(Script::always(behavior));
        assert_eq!(client.read(4 * MIB, 512), Err(EIO));
        server.wait_for_log(label, |line| line.reason().starts_with(label));
    }
    store.set_script(Script::new());
    sample().is_read_at(&mut client, 4 * MIB);
    sample().is_read(&mut server.go(""));
}
