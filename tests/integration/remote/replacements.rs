//! Objects that are replaced or deleted while clients read them: never a mixture.

use object_server::{Behavior, Rule, Script};

use super::{BLOCK, MIB, WEB, assert_no_export, gateway_of, other_sample, pause, sample, store};
use crate::support::client::{Client, EIO, Session};

/// Reads all blocks of an image, and returns how many of them could be read: each of them has the
/// content of the first version.
fn readable_blocks(client: &mut Client<Session>) -> usize {
    let offsets = (0..sample().image.len() as u64).step_by(BLOCK as usize);
    let read = offsets.filter(|&offset| match client.read(offset, BLOCK as u32) {
        Ok(bytes) => {
            assert!(bytes == sample().part(offset, BLOCK), "mixed at {offset}");
            true
        }
        Err(error) => {
            assert_eq!(error, EIO);
            false
        }
    });
    read.count()
}

/// The object is replaced. The reader's cached chunks go on; a new client gets the new content.
fn is_replaced_safely(script: impl Fn() -> Script) {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1s"]).start();
    store.set_script(script());
    let mut client = server.go("");
    sample().is_read_at(&mut client, 4 * MIB);
    store.put(WEB, other_sample().bytes());
    // Clients that come while the old version is fresh get that, as far as it is cached.
    sample().is_read_at(&mut server.go(""), 4 * MIB);
    assert_eq!(client.read(2 * MIB, 4096), Err(EIO));
    server.wait_for_reason("object_changed");
    server.wait_for_reason("store_changed");
    sample().is_read_at(&mut client, 4 * MIB);
    let readable = readable_blocks(&mut client);
    assert!((4..64).contains(&readable), "{readable}");

    pause(1100);
    let mut later = server.go("");
    other_sample().is_read(&mut later);
    // The first one goes on with what it had.
    sample().is_read_at(&mut client, 0);
    assert_eq!(readable_blocks(&mut client), readable);
}

#[test]
fn a_replaced_object_is_never_mixed() {
    is_replaced_safely(Script::new);
}

#[test]
fn a_store_may_ignore_conditions() {
    is_replaced_safely(|| Script::always(Behavior::new().ignore_conditions()));
}

/// The tag stays the same, as on a cache that is wrong; the date doesn't.
#[test]
fn replaced_during_a_request() {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1ms"]).start();
    let replacing = Behavior::new().then_replace_object(other_sample().bytes());
    let rule = Rule::new(replacing).ranged(true).times(1);
    let mut client = server.go("");
    store.set_script(Script::new().rule(rule));
    sample().is_read_at(&mut client, 4 * MIB);
    assert_eq!(client.read(2 * MIB, 4096), Err(EIO));
    other_sample().is_read(&mut server.go(""));
}

/// Clients that come one after another while the object changes all the time see one version each.
#[test]
fn replaced_again_and_again() {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1ms"]).start();
    let versions = [sample(), other_sample()];
    for round in 0..6 {
        let version = versions[round % 2];
        store.put(WEB, version.bytes());
        let mut client = server.go("");
        version.is_read_at(&mut client, 3 * MIB);
        store.put(WEB, versions[(round + 1) % 2].bytes());
        version.is_read_at(&mut client, 3 * MIB);
        match client.read(6 * MIB, 4096) {
            Ok(bytes) => assert!(bytes == version.part(6 * MIB, 4096)),
            Err(error) => assert_eq!(error, EIO),
        }
    }
}

#[test]
fn a_deleted_object() {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1s"]).start();
    let mut client = server.go("");
    sample().is_read_at(&mut client, 4 * MIB);
    store.remove(WEB);
    assert_eq!(client.read(2 * MIB, 4096), Err(EIO));
    server.wait_for_reason("store_not_found");
    sample().is_read_at(&mut client, 4 * MIB);
    pause(1100);
    assert_no_export(&server, "");
    sample().is_read_at(&mut client, 4 * MIB);
    // It is put back, and the same again.
    store.put(WEB, sample().bytes());
    crate::support::wait_until("it is served again", || super::has_export(&server, "web.hxz"));
    sample().is_read(&mut server.go("web.hxz"));
}
