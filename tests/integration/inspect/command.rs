//! `hexz-nbd inspect`, as it is run.

use std::ffi::OsString;
use std::fs;

use serde_json::Value;

use crate::archive_writer::{ArchiveWriter, Piece, text};
use crate::support::archive;
use crate::support::server::{Ended, run};

fn inspect<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Ended {
    run(std::iter::once("inspect".into()).chain(args.into_iter().map(Into::into)))
}

fn json(args: &[&str], name: &str) -> Value {
    json_of(args.iter().map(OsString::from).chain([archive(name).into()]), 0)
}

fn json_of<A: Into<OsString>>(args: impl IntoIterator<Item = A>, code: i32) -> Value {
    let ended = inspect(["--json".into()].into_iter().chain(args.into_iter().map(Into::into)));
    assert_eq!(ended.code, Some(code), "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

/// Returns the labels of the faults.
fn reasons(seen: &Value) -> Vec<&str> {
    let faults = seen["faults"].as_array().unwrap().iter();
    faults.map(|fault| fault["reason"].as_str().unwrap()).collect()
}

#[test]
fn json_has_what_help_says() {
    let seen = json(&[], "grandchild-zstd.hxz");
    for (field, value) in [
        ("/file_length", 49_616),
        ("/logical_bytes", 8_388_608),
        ("/format", 1),
        ("/blocks/nominal", 65_536),
        ("/blocks/chunking/average", 65_536),
        ("/index/pages", 1),
        ("/index/page_bytes", 8 + 34 * 52),
        ("/streams/main/size", 8_388_608),
        ("/streams/main/blocks", 34),
        ("/streams/main/stored/blocks", 3),
        ("/streams/main/stored_zeros/blocks", 1),
        ("/streams/main/lengths/largest", 262_144),
        ("/streams/main/lengths/median", 262_144),
        ("/streams/main/unresolvable/blocks", 0),
        ("/streams/auxiliary/size", 0),
        ("/stored/copies", 4),
        ("/stored/duplicates", 0),
        ("/parents/0/child", 0),
        ("/parents/1/found", 2),
        ("/chain/2/depth", 2),
        ("/more_faults", 0),
    ] {
        assert_eq!(seen.pointer(field), Some(&Value::from(value)), "{field} of {seen:#}");
    }
    assert_eq!(seen["compression"], "Zstandard");
    assert_eq!(seen["parents"][0]["name"], "child-zstd.hxz");
    assert_eq!(seen["signature"], "none");
    assert_eq!((&seen["encryption"], &seen["manifest"]), (&Value::Null, &Value::Null));
    // Every field is told of, and everything told of is there.
    let help = run(["inspect", "--help"]).stdout;
    for field in seen.as_object().unwrap().keys() {
        assert!(help.contains(field.as_str()), "{field} isn't in --help");
    }
}

#[test]
fn wording() {
    let ended = inspect([archive("base-zstd.hxz")]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    for line in [
        "  file          164658 bytes (160.8 KiB)",
        "  blocks        64.0 KiB nominal, cut by content: 16.0 KiB to 256.0 KiB, average 64.0 KiB",
        "  signature     none",
        "  duplicates    27 blocks with the copy of another block, saving 702 bytes",
    ] {
        assert!(ended.stdout.lines().any(|told| told == line), "{line}\n{}", ended.stdout);
    }
    let ended = inspect([archive("encrypted-zstd.hxz")]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("in 600000 iterations"), "{}", ended.stdout);
    let ended = inspect(["--files".into(), archive("tree.hxz")]);
    assert_eq!(ended.code, Some(0));
    assert!(ended.stdout.contains("17 files of 288662 bytes"), "{}", ended.stdout);
    assert_eq!(ended.stdout.lines().rev().take_while(|line| line.starts_with("   ")).count(), 17);
}

#[test]
fn files_for_machines() {
    let seen = json(&["--files"], "tree.hxz");
    let list = seen["manifest"]["list"].as_array().unwrap();
    assert_eq!(list.len(), 17);
    let sum: u64 = list.iter().map(|file| file["size"].as_u64().unwrap()).sum();
    assert_eq!(sum, 288_662);
    assert_eq!(json(&[], "tree.hxz")["manifest"]["list"], Value::Null);
}

#[test]
fn signatures() {
    let key = archive("signed.public.key");
    let with_key = |key: &OsString, name: &str, code| {
        json_of(["--verify-key".into(), key.clone(), archive(name).into()], code)
    };
    let key = key.into_os_string();
    assert_eq!(with_key(&key, "signed-zstd.hxz", 0)["signature"], "valid");
    let none = with_key(&key, "base-zstd.hxz", 1);
    assert_eq!((&none["signature"], reasons(&none)), (&"none".into(), vec!["not_signed"]));
    let other = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391db".into();
    let other = with_key(&other, "signed-zstd.hxz", 1);
    assert_eq!((&other["signature"], reasons(&other)), (&"invalid".into(), vec!["signature"]));
}

#[test]
fn exit_codes() {
    assert_eq!(inspect(["/nowhere.hxz"]).code, Some(3));
    let none = inspect([archive("signed.public.key")]);
    assert_eq!((none.code, none.stdout.as_str()), (Some(3), ""));
    assert!(none.stderr.contains("reason=\"not_hexz\""), "{}", none.stderr);
    assert_eq!(inspect::<OsString>([]).code, Some(2));
    assert_eq!(inspect(["--verify-key", "/nowhere", "x.hxz"]).code, Some(3));

    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("alone.hxz");
    fs::copy(archive("child-zstd.hxz"), &alone).unwrap();
    let seen = json_of([&alone], 1);
    let parent = &seen["parents"][0];
    assert_eq!((&parent["name"], &parent["found"]), (&"base-zstd.hxz".into(), &Value::Null));
    assert_eq!(reasons(&seen), ["parent_missing", "unresolvable"]);
    let ended = inspect([alone]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stdout.contains("[parent_missing]\n"), "{}", ended.stdout);
}

/// Names that others chose can't disturb a terminal.
#[test]
fn control_characters_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.hxz");
    let writer = ArchiveWriter {
        main: vec![Piece::Data(text(1, 100))],
        parents: vec!["\u{1b}[31mred\u{202e}".to_owned()],
        metadata: Some(br#"{"files":[{"path":"\u001b]0;title\u0007","size":100}]}"#.to_vec()),
        ..ArchiveWriter::default()
    };
    writer.write().save(&path);
    let ended = inspect(["--files".into(), path]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let bad =
        |character: char| (character.is_control() && character != '\n') || character == '\u{202e}';
    assert!(!ended.stdout.contains(bad), "{:?}", ended.stdout);
    assert!(ended.stdout.contains("\\u{1b}[31mred"), "{}", ended.stdout);
}
