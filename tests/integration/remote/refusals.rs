//! Servers from which archives can't be read safely: the label says so, at the start and later.

use object_server::{Behavior, ETag, ObjectServer, Rule, Script};

use super::{MIB, WEB, gateway_of, sample, store};
use crate::support::client::EIO;

/// Checks that the gateway doesn't start with a store that behaves like that.
#[track_caller]
fn is_refused(store: &ObjectServer, behavior: Behavior, label: &str) -> String {
    store.set_script(Script::always(behavior));
    let args = ["--strict", "--store-timeout", "2s"];
    gateway_of(store).args(args).fails_with(3, label)
}

#[test]
fn whole_objects_instead_of_ranges() {
    is_refused(&store(), Behavior::new().ignore_range(), "store_unsupported");
}

#[test]
fn compressed_responses() {
    is_refused(&store(), Behavior::new().gzip(), "store_unsupported");
}

#[test]
fn no_entity_tag_and_no_date() {
    let behavior = Behavior::new().etag(ETag::Absent).without_header("last-modified");
    is_refused(&store(), behavior, "store_unsupported");
}

/// A date alone, or with a weak tag, is better than nothing.
#[test]
fn versions_can_be_told_apart_by_the_date() {
    for etag in [ETag::Absent, ETag::Weak] {
        let store = store();
        store.set_script(Script::always(Behavior::new().etag(etag)));
        let server = gateway_of(&store).start();
        sample().is_read(&mut server.go(""));
        let line = server.wait_for_reason("store_identity");
        assert_eq!(line.json["store"], store.endpoint(), "{}", line.text);
    }
    assert!(!gateway_of(&store()).start().has_reason("store_identity"));
}

#[test]
fn redirects() {
    let other = store();
    let message = is_refused(&store(), Behavior::redirect(&other.url(WEB)), "store_unsupported");
    assert!(message.contains("127.0.0.1"), "{message}");
    let secret = other.url(WEB) + "?X-Amz-Signature=012345";
    let message = is_refused(&store(), Behavior::redirect(&secret), "store_unsupported");
    assert!(!message.contains("012345"), "{message}");
    assert_eq!(other.log().totals().requests, 0);
}

#[test]
fn wrong_content_ranges() {
    let store = store();
    for range in ["bytes 1-262144/8500000", "bytes */8500000", "nonsense"] {
        is_refused(&store, Behavior::new().content_range(range), "store_unsupported");
    }
    // More bytes than announced may also be an accident, so they are requested again.
    is_refused(&store, Behavior::new().content_range("bytes 0-1/2"), "store_down");
}

#[test]
fn missing_objects() {
    let store = store();
    store.remove(WEB);
    gateway_of(&store).arg("--strict").fails_with(3, "store_not_found");
}

/// The same, once an archive is open: reads fail, and the client stays connected.
#[test]
fn a_store_that_becomes_unusable() {
    let (offset, length) = (4 * MIB, sample().archive.bytes.len());
    for (behavior, label) in [
        (Behavior::new().ignore_range(), "store_unsupported"),
        (Behavior::new().gzip(), "store_unsupported"),
        (Behavior::redirect("http://127.0.0.1/x"), "store_unsupported"),
        (Behavior::new().content_range(&format!("bytes 5-9/{length}")), "store_"),
        (Behavior::new().lengthen_by(10), "store_"),
        (Behavior::status(403), "store_denied"),
        (Behavior::status(400), "store_unsupported"),
    ] {
        let store = store();
        let server = gateway_of(&store).args(["--store-timeout", "1s"]).start();
        let mut client = server.go("");
        store.set_script(Script::new().rule(Rule::new(behavior.clone())));
        assert_eq!(client.read(offset, 4096), Err(EIO), "{behavior:?}");
        server.wait_for_log(label, |line| line.reason().starts_with(label));
        sample().is_read_at(&mut client, 0);
        store.set_script(Script::new());
        sample().is_read_at(&mut client, offset);
    }
}
