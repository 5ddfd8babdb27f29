//! Backups by what has changed.

use super::{output, qemu, run, tls, uri};
use crate::support::server::Server;
use crate::support::structured::{Extent, Mode};
use crate::support::{IMAGE_SIZE, image, sha256};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";
const CHILD_SHA256: &str = "bdfb933e575594c1e7909a1d8cac0836966fad767893806bd8303d0b2ce7c8d1";
const GRANDCHILD: &str = "grandchild-zstd.hxz";
const GRANDCHILD_SHA256: &str = "b2bc3711e3005be4f34b835d6b3375c64674ad995ac3eb4065575e3ea8764433";

/// What the scripted client is told.
fn expected(server: &Server, export: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let mut peer = server.peer(Mode::Extended, export, &[context]);
    let mut at = 0;
    let place = |Extent { length, flags }| {
        at += length;
        (at - length, length, flags)
    };
    peer.map(0, IMAGE_SIZE).into_iter().map(place).collect()
}

#[test]
fn nbdinfo_maps_what_has_changed() {
    let server = tls(GRANDCHILD).start();
    for context in [
        "hexz:changed:base-zstd.hxz",
        "hexz:changed:child-zstd.hxz",
        "qemu:dirty-bitmap:base-zstd.hxz",
    ] {
        let said = run("nbdinfo", &["--map", &format!("--map={context}"), &uri(&server, "")]).ok();
        let number = |field: Option<&str>| field.unwrap().parse().unwrap();
        let map: Vec<(u64, u64, u64)> = said
            .lines()
            .map(|line| {
                let mut fields = line.split_ascii_whitespace();
                (number(fields.next()), number(fields.next()), number(fields.next()))
            })
            .collect();
        assert_eq!(map, expected(&server, "", context), "{said}");
    }
    let said = run("nbdinfo", &["--map=hexz:changed:nothing", &uri(&server, "")]).failed();
    assert!(said.contains("hexz:changed:nothing"), "{said}");
}

/// qemu shows what a bitmap marks as dirty as if it were no data.
#[test]
fn qemu_maps_what_has_changed() {
    let server = tls(GRANDCHILD).start();
    let [object, creds, image_opts, source] = qemu(&server, "");
    let context = "qemu:dirty-bitmap:child-zstd.hxz";
    let source = format!("{source},x-dirty-bitmap={context}");
    let said =
        run("qemu-img", &["map", "--output=json", &object, &creds, &image_opts, &source]).ok();
    let map: Vec<serde_json::Value> = serde_json::from_str(&said).unwrap();
    let map: Vec<(u64, u64, u64)> = map
        .iter()
        .map(|extent| {
            let number = |field: &str| extent[field].as_u64().unwrap();
            (number("start"), number("length"), (!extent["data"].as_bool().unwrap()).into())
        })
        .collect();
    assert_eq!(map, expected(&server, "", context), "{said}");
}

/// The example brings a copy of the base up to date, twice, and at once.
#[test]
fn the_example_copies_only_what_has_changed() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/incremental-copy.py");
    let server = tls(GRANDCHILD).archive(CHILD).start();
    let (_folder, copy) = output();
    let update = |export: &str, older: &str| {
        let arguments = [script, &uri(&server, export), older, copy.to_str().unwrap()];
        run("/usr/bin/python3", &arguments)
    };
    let copied = |said: String| {
        let read: u64 = said.split(' ').next().unwrap().parse().unwrap();
        assert!((1..IMAGE_SIZE / 2).contains(&read), "{said}");
        sha256(&std::fs::read(&copy).unwrap())
    };

    std::fs::write(&copy, image()).unwrap();
    assert_eq!(copied(update(CHILD, BASE).ok()), CHILD_SHA256);
    assert_eq!(copied(update(GRANDCHILD, CHILD).ok()), GRANDCHILD_SHA256);
    // Once more makes no difference.
    assert_eq!(copied(update(GRANDCHILD, BASE).ok()), GRANDCHILD_SHA256);
    std::fs::write(&copy, image()).unwrap();
    assert_eq!(copied(update(GRANDCHILD, BASE).ok()), GRANDCHILD_SHA256);

    let said = update(GRANDCHILD, "nothing").failed();
    assert!(said.contains("can't compare with nothing"), "{said}");
    update("nothing", BASE).failed();
    assert_eq!(copied(update(GRANDCHILD, CHILD).ok()), GRANDCHILD_SHA256);
}
