//! `hexz-nbd check`: what the rules say, without a server.

use super::rules_file;
use crate::support::server::run;

const RULES: &str = r#"
[[rule]]
name = "not at the weekend"
action = "deny"
hours = "Sat,Sun"

[[rule]]
name = "backup"
action = "allow"
network = "10.0.0.0/8"
identity = "uri:spiffe://corp/backup/*"
export = "web-*"

[[rule]]
action = "allow"
network = ["unix", "vsock:7"]
"#;

/// A Tuesday.
const TUESDAY: &str = "2026-11-24T12:00:00Z";
const SATURDAY: &str = "2026-11-28T12:00:00Z";

fn check(args: &[&str]) -> (i32, String) {
    let ended = run([&["check"], args].concat());
    (ended.code.unwrap(), ended.stdout + &ended.stderr)
}

#[test]
fn it_says_who_may_do_what_and_why() {
    let (_folder, rules) = rules_file(RULES);
    let rules = ["--rules", rules.to_str().unwrap()];
    let ask = |more: &[&str]| check(&[&rules[..], more].concat());
    let backup = ["--as", "spiffe://corp/backup/1"];
    let inside = ["--from", "10.1.2.3"];

    let (code, words) = ask(&[&inside[..], &backup, &["--at", TUESDAY, "web-1"]].concat());
    assert_eq!(code, 0, "{words}");
    assert!(words.contains("rule 2, line 7 of"), "{words}");
    assert!(words.contains("(backup)"), "{words}");

    let (code, words) = ask(&[&inside[..], &backup, &["--at", SATURDAY, "web-1"]].concat());
    assert_eq!(code, 1, "{words}");
    assert!(words.contains("rule 1, line 2 of"), "{words}");

    for (code, from, who, name) in [
        (0, "10.1.2.3", "uri:spiffe://corp/backup/1", "web-1"),
        (0, "::ffff:10.1.2.3", "spiffe://corp/backup/1", "web-1"),
        (1, "10.1.2.3", "cn:spiffe://corp/backup/1 ", "web-1"),
        (1, "10.1.2.3", "spiffe://corp/restore/1", "web-1"),
        (1, "11.1.2.3", "spiffe://corp/backup/1", "web-1"),
        (1, "10.1.2.3", "spiffe://corp/backup/1", "db"),
        (0, "unix", "anybody", "db"),
        (1, "vsock:3", "anybody", "db"),
        (0, "vsock:7", "anybody", "db"),
    ] {
        let (got, words) = ask(&["--from", from, "--as", who, "--at", TUESDAY, name]);
        assert_eq!(got, code, "{from} {who} {name}: {words}");
    }
    // Without an export: whether it may come in at all.
    assert_eq!(ask(&[&inside[..], &backup, &["--at", TUESDAY]].concat()).0, 0);
    assert_eq!(ask(&["--from", "10.1.2.3", "--at", TUESDAY]).0, 1);
}

#[test]
fn it_knows_the_options_of_the_command_line() {
    assert_eq!(check(&["--from", "127.0.0.1"]).0, 0);
    assert_eq!(check(&["--from", "10.0.0.1"]).0, 1);
    let (code, words) =
        check(&["--allow", "10.0.0.0/8", "--deny", "10.6.0.0/16", "--from", "10.6.0.1"]);
    assert_eq!(code, 1);
    assert!(words.contains("--deny 10.6.0.0/16"), "{words}");
}

#[test]
fn what_makes_no_sense_is_another_exit_code() {
    assert_eq!(check(&["--from", "nowhere"]).0, 2);
    assert_eq!(check(&["--from", "::1", "--rules", "/nonexistent"]).0, 2);
    assert_eq!(check(&["--from", "::1", "--at", "tomorrow"]).0, 2);
    assert_eq!(check(&[]).0, 2);
}

/// The example that people begin with.
#[test]
fn the_example_is_good() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/rules.toml");
    let (code, words) = check(&["--rules", example, "--from", "unix", "snap.hexz"]);
    assert_eq!(code, 0, "{words}");
}
