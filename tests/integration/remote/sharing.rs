//! Clients that read the same archive share what is fetched.

use std::thread;

use super::{gateway_of, sample, store};

#[test]
fn twenty_clients_cost_no_more_than_one() {
    let store = store();
    let one = {
        let server = gateway_of(&store).start();
        sample().is_read(&mut server.go(""));
        store.log().totals()
    };
    store.log().clear();
    let server = gateway_of(&store).start();
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| sample().is_read(&mut server.go("")));
        }
    });
    let many = store.log().totals();
    assert!(many.data_bytes * 100 <= one.data_bytes * 102, "{many:?} instead of {one:?}");
}

/// One client reads from the front, one from the back, some at random.
#[test]
fn clients_in_different_places_share_too() {
    let store = store();
    let server = gateway_of(&store).start();
    let blocks = sample().image.len() as u64 / super::BLOCK;
    thread::scope(|scope| {
        for step in [1, blocks - 1, 7, 13, 53] {
            let server = &server;
            scope.spawn(move || {
                let mut client = server.go("");
                for number in 0..blocks {
                    sample().is_read_at(&mut client, number * step % blocks * super::BLOCK);
                }
            });
        }
    });
    let totals = store.log().totals();
    let length = sample().archive.bytes.len() as u64;
    assert!(totals.data_bytes * 100 <= length * 110, "{totals:?}, {length}");
}
