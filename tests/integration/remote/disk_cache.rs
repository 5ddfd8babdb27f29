//! Chunks on disk, which survive restarts.

use std::path::Path;

use super::{BLOCK, Builder, WEB, gateway_of, sample, store};
use crate::support::server::{Ended, run};

fn cached(store: &object_server::ObjectServer, folder: &Path) -> Builder {
    gateway_of(store).args(["--disk-cache-size", "16MiB", "--disk-cache"]).arg(folder)
}

fn cache(command: &str, folder: &Path) -> Ended {
    run([Path::new("cache"), Path::new(command), folder])
}

#[test]
fn a_restarted_gateway_reads_nothing_from_the_store() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    assert_eq!(server.terminate().code(), Some(0));

    store.log().clear();
    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    assert_eq!(server.terminate().code(), Some(0));
    assert_eq!(store.log().totals().data_bytes, 0, "{:?}", store.log().entries());

    // Nor does it need the store to be up.
    store.stop();
    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    server.terminate();
}

#[test]
fn a_replaced_object_is_not_read_from_disk() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    server.terminate();
    store.put(WEB, super::other_sample().bytes());
    let mut server = cached(&store, folder.path()).start();
    super::other_sample().is_read(&mut server.go(""));
    server.terminate();
}

/// The version in the cache isn't hashed, nor is its tree expected to be right, when the store has
/// another one.
#[test]
fn a_replaced_object_with_a_digest_is_opened_with_its_new_tree() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    for sample in [sample(), super::other_sample(), sample()] {
        store.put(WEB, sample.bytes());
        store.put(format!("{WEB}.tree").as_str(), super::tree_of(sample));
        store.log().clear();
        let builder = cached(&store, folder.path()).arg("--digest").arg(sample.digest("web.hxz"));
        let mut server = builder.start();
        let fetched = store.log().totals().data_bytes;
        assert!(fetched < super::MIB, "{fetched}");
        assert!(!server.has_reason("tree_unusable"));
        sample.is_read(&mut server.go(""));
        server.terminate();
    }
}

#[test]
fn a_damaged_cache_costs_requests_and_nothing_else() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    server.signal("KILL");
    server.wait();
    let chunks = folder.path().join("chunks");
    let mut bytes = std::fs::read(&chunks).unwrap();
    bytes.iter_mut().step_by(100_000).for_each(|byte| *byte ^= 1);
    std::fs::write(&chunks, bytes).unwrap();
    let ended = cache("check", folder.path());
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);

    let mut server = cached(&store, folder.path()).start();
    sample().is_read(&mut server.go(""));
    server.terminate();
}

#[test]
fn one_gateway_uses_a_folder() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let server = cached(&store, folder.path()).start();
    sample().is_read_at(&mut server.go(""), BLOCK);
    cached(&store, folder.path()).fails_with(1, "disk_cache_in_use");
    let shown = cache("show", folder.path());
    assert!(
        shown.stdout.contains("web.hxz") && shown.stdout.contains("in use"),
        "{}",
        shown.stdout
    );
    assert_eq!(cache("clear", folder.path()).code, Some(1));
    drop(server);
    assert_eq!(cache("clear", folder.path()).code, Some(0));
    assert!(!cache("show", folder.path()).stdout.contains("web.hxz"));
}
