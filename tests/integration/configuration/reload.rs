//! Reading the configuration file anew, while clients are in.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{BASE, CHILD, Site, replace};
use crate::support::client::{FLAGS, OPT_GO, OPT_STARTTLS, REP_ERR_UNKNOWN, info_data};
use crate::support::pki::Pki;
use crate::support::server::{Line, Server};
use crate::support::{PASSWORD, image, wait_until};

/// Sends SIGHUP and waits for what comes of it: so many lines that begin like that.
fn reload(server: &Server, text: &str, times: usize) {
    server.signal("HUP");
    wait_for(server, text, times);
}

fn wait_for(server: &Server, text: &str, times: usize) {
    wait_until(text, || {
        let log = server.log();
        log.iter().filter(|line| is(line, text)).count() >= times
    });
}

/// Whether a line begins like that, or has this label.
fn is(line: &Line, text: &str) -> bool {
    line.message().starts_with(text) || line.reason() == text
}

/// The last line with this label.
fn last(server: &Server, reason: &str) -> Line {
    let line = server.log().into_iter().rfind(|line| line.reason() == reason);
    line.unwrap_or_else(|| panic!("{reason}: {}", server.log_text()))
}

#[test]
fn exports_come_and_go_and_open_sessions_go_on() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let server = site.server().start();
    let mut before = server.go("");
    before.read_ok(0, 512);

    site.say(&format!(
        "default-export = 'c'\n[exports]\na = '{{archives}}/{BASE}'\nc = '{{archives}}/{CHILD}'"
    ));
    reload(&server, "now serving", 1);
    assert_eq!(server.greeted().list(), ["a", "c"]);
    let mut child = server.go("c");
    child.read_ok(0, 512);
    server.assert_alive();

    site.say("export-dir = '{archives}'\ndefault-export = 'base-lz4.hxz'");
    reload(&server, "now serving", 2);
    server.greeted().go("base-lz4.hxz");
    server.greeted().refused(OPT_GO, &info_data(b"a", &[]), REP_ERR_UNKNOWN);
    // What they read isn't served any more, but they go on.
    assert_eq!(before.read_ok(4096, 512), image()[4096..4608]);
    child.read_ok(4096, 512);
}

/// What is open isn't opened anew, and what is decoded is known: nothing is read for it.
#[test]
fn what_stays_stays_open_and_cached() {
    let site = Site::new("digest = '{}/digests'\n[exports]\na = '{}/a.hxz'");
    site.copy(BASE, "a.hxz");
    let digests = crate::support::server::run(["digest".into(), site.path("a.hxz")]);
    fs::write(site.path("digests"), digests.stdout).unwrap();
    let server = site.server().start();
    let mut client = server.go("");
    client.read_ok(0, 1 << 20);
    let size = fs::metadata(site.path("a.hxz")).unwrap().len();
    let before = server.file_bytes_read();
    site.say("digest = '{}/digests'\ndefault-export = 'b'\n[exports]\nb = '{}/a.hxz'");
    reload(&server, "now serving", 1);
    let mut client = server.go("b");
    assert_eq!(client.read_ok(0, 512), image()[..512]);
    // The header and the index are read, but not all of it to be hashed once more.
    let read = server.file_bytes_read() - before;
    assert!(read < size / 2, "{read} of {size}");
}

#[test]
fn who_may_come_in_is_what_the_file_says() {
    let exports = format!("insecure-no-tls = true\n[exports]\na = '{{archives}}/{BASE}'");
    let site = Site::new(&format!("allow = '127.0.0.0/8'\n{exports}"));
    let server = site.server().start();
    let mut stays = server.connect_from([127, 0, 0, 2]);
    stays.greet(FLAGS);
    stays.go("");
    let mut leaves = server.go("");
    site.say(&format!("allow = '127.0.0.2'\n{exports}"));
    reload(&server, "reloaded: open to 127.0.0.2", 1);
    leaves.expect_closed();
    stays.read_ok(0, 512);
    assert!(server.connect().rest().0.is_empty());

    replace(&site.path("rules"), "[[rule]]\naction = 'allow'\nnetwork = '127.0.0.1'");
    site.say(&format!("rules = '{{}}/rules'\n{exports}"));
    reload(&server, "reloaded", 2);
    stays.expect_closed();
    server.assert_alive();
}

/// A name comes to mean another archive, which everybody may read; it isn't there yet.
#[test]
fn rules_for_other_archives_open_none_that_were_there() {
    let site = Site::new("");
    let say = |x: &str, rules: &str| {
        replace(&site.path("rules"), rules);
        site.say(&format!(
            "strict = true\nrules = '{{}}/rules'\n[exports]\nx = '{x}'\ny = '{{archives}}/{CHILD}'"
        ));
    };
    let everything = "[[rule]]\naction = 'allow'\nnetwork = '127.0.0.1'";
    say(&format!("{{archives}}/{BASE}"), &format!("{everything}\nexport = 'y'"));
    let server = site.server().start();
    // This one began before all that, and chooses when it is over.
    let mut early = server.greeted();
    early.refused(OPT_GO, &info_data(b"x", &[]), REP_ERR_UNKNOWN);

    say("{}/later.hxz", everything);
    reload(&server, "archives_not_reloaded", 1);
    for client in [&mut early, &mut server.greeted()] {
        client.refused(OPT_GO, &info_data(b"x", &[]), REP_ERR_UNKNOWN);
        assert_eq!(client.list(), ["y"]);
    }

    site.copy(CHILD, "later.hxz");
    site.copy(BASE, BASE);
    reload(&server, "now serving", 1);
    let mut same = server.go("y");
    let (mut one, mut two) = (early, server.greeted());
    for client in [&mut one, &mut two] {
        client.go("x");
        assert_eq!(client.read_ok(0, 1 << 20), same.read_ok(0, 1 << 20));
    }
}

#[test]
fn another_certificate_is_shown() {
    let (old, new) = (Pki::new(), Pki::new());
    let site = Site::new("");
    let say = |pki: &Pki, name: &str| {
        let (cert, key) = (site.path(&format!("{name}.pem")), site.path(&format!("{name}.key")));
        fs::copy(pki.server_cert(), &cert).unwrap();
        fs::copy(pki.server_key(), &key).unwrap();
        site.say(&format!(
            "tls-cert = '{}'\ntls-key = '{}'\n[exports]\na = '{{archives}}/{BASE}'",
            cert.display(),
            key.display()
        ));
    };
    say(&old, "old");
    let server = site.server().start();
    let comes_in = |pki: &Pki| {
        let mut client = server.connect();
        client.greet(FLAGS);
        assert_eq!(client.option(OPT_STARTTLS, b"").len(), 1);
        client.handshake(pki.client_config()).is_ok()
    };
    assert!(comes_in(&old));
    say(&new, "new");
    reload(&server, "reloaded", 1);
    assert!(comes_in(&new) && !comes_in(&old));

    // Those who are in would go on in clear, or would have been promised TLS.
    site.say(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    reload(&server, "reload_failed", 1);
    assert_eq!(last(&server, "reload_failed").json["cause"], "tls_toggled");
    assert!(comes_in(&new));
}

#[test]
fn a_broken_file_changes_nothing_and_says_why() {
    let sound = format!(
        "allow = '127.0.0.0/8'\ninsecure-no-tls = true\n[exports]\na = '{{archives}}/{BASE}'"
    );
    let site = Site::new(&sound);
    let server = site.server().start();
    let mut client = server.go("");
    let mut failed = 0;
    for (text, complaint) in [
        ("allow = '127.0.0.2'\nlisen = 7", "\"lisen\""),
        ("allow = '127.0.0.2", "hexz-nbd.toml, line 1: "),
        ("allow = '127.0.0.2'", "export-dir"),
        ("allow = '127.0.0.2'\nmax-connections = 0", "line 2: max-connections: "),
        ("allow = '127.0.0.2'\nrules = '{}/none'\n[exports]\na = '{}/x'", "line 2: rules "),
        ("rules = '{}/none'\n[exports]\na = '{}/x'", "can't use the rules"),
        ("default-export = 'b'\n[exports]\na = '{}/x'", "the default export \"b\""),
        ("digest = '{}/none'\n[exports]\na = '{}/x'", "can't read the list"),
        ("password-file = '{}/none'\n[exports]\na = '{}/x'", "can't use the password"),
        ("x = 1\ny = 2", "\"x\""),
        ("x = 1\ny = 2", "\"y\""),
    ] {
        site.say(text);
        failed += 1;
        reload(&server, "reload_failed", failed);
        let said = last(&server, "reload_failed");
        assert!(said.message().contains(complaint), "{complaint}: {said:?}");
        server.assert_alive();
    }
    fs::remove_file(site.file()).unwrap();
    reload(&server, "reload_failed", failed + 1);
    assert!(last(&server, "reload_failed").message().contains("hexz-nbd.toml: "));
    client.read_ok(0, 512);
    site.say(&sound);
    reload(&server, "reloaded", 1);
    client.read_ok(0, 512);
}

/// Who is revoked has to go, whatever becomes of an archive; what was served is served.
#[test]
fn archives_that_can_not_be_opened_stay_what_they_were() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let server = site.server().start();
    site.say("[exports]\nb = '{}/none'");
    reload(&server, "archives_not_reloaded", 1);
    assert_eq!(server.greeted().list(), ["a"]);
    // As soon as it is there, it is.
    site.copy(BASE, "none");
    reload(&server, "now serving b", 1);
    assert_eq!(server.greeted().list(), ["b"]);
}

#[test]
fn what_can_not_change_is_named_and_stays() {
    let exports = format!("[exports]\na = '{{archives}}/{BASE}'");
    let site = Site::new(&format!("max-connections = 1\ncache-size = '64MiB'\n{exports}"));
    // The command line's --listen counts, whatever the file says.
    let server = site.server().start();
    reload(&server, "reloaded", 1);
    assert!(!server.has_reason("needs_restart"), "{}", server.log_text());
    site.say(&format!(
        "max-connections = 2\ncache-size = '32MiB'\nlisten = '127.0.0.1:1'\nverbose = 1\n\
         audit = '{{}}/audit'\ninsecure-no-tls = true\nuser = 'nobody'\nstrict = true\n{exports}"
    ));
    reload(&server, "reloaded", 2);
    let named = "audit, cache-size, insecure-no-tls, max-connections, user, verbose";
    assert!(last(&server, "needs_restart").message().ends_with(named), "{}", server.log_text());
    let mut first = server.go("");
    first.read_ok(0, 1);
    assert!(server.connect().rest().0.is_empty());
    server.wait_for_reason("connections");
    drop(first);
}

/// How archives are opened is exchanged with them: they are opened anew.
#[test]
fn parents_and_passwords_are_found_where_the_file_says() {
    let site = Site::new("");
    site.copy(CHILD, "child.hxz");
    let parents = site.path("parents");
    fs::create_dir(&parents).unwrap();
    site.copy(BASE, &format!("parents/{BASE}"));
    site.copy("encrypted-zstd.hxz", "secret.hxz");
    let password = site.path("password");
    fs::write(&password, PASSWORD).unwrap();
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    let exports = "[exports]\nchild = '{}/child.hxz'\nsecret = '{}/secret.hxz'\n\
                   base = '{archives}/base-zstd.hxz'";
    site.say(exports);
    let server = site.server().start();
    assert_eq!(server.greeted().list(), ["base"]);
    site.say(&format!("parent-dir = '{{}}/parents'\n{exports}"));
    reload(&server, "now serving", 1);
    assert_eq!(server.greeted().list(), ["child", "base"]);
    site.say(&format!("parent-dir = '{{}}/parents'\npassword-file = '{{}}/password'\n{exports}"));
    reload(&server, "now serving", 2);
    assert_eq!(server.greeted().list(), ["child", "secret", "base"]);
    assert_eq!(server.go("secret").read_ok(4096, 512), image()[4096..4608]);
}

/// Landlock lets read what was named at the start.
#[test]
fn what_the_sandbox_closes_takes_a_restart() {
    let (site, elsewhere) = (Site::new(""), Site::new(""));
    let own = site.copy(BASE, "a.hxz");
    let other = elsewhere.copy(BASE, "b.hxz");
    site.say("sandbox = 'require'\n[exports]\na = '{}/a.hxz'");
    let server = site.server().args(["--sandbox", "require"]).start();
    site.say(&format!(
        "sandbox = 'require'\n[exports]\na = '{}'\nb = '{}'",
        own.display(),
        other.display()
    ));
    reload(&server, "reload_failed", 1);
    let line = last(&server, "reload_failed");
    assert_eq!(line.json["cause"], "outside_sandbox");
    assert!(line.message().contains(other.to_str().unwrap()), "{}", line.text);
    server.assert_alive();

    // A new one beside the old ones can be read.
    site.copy(CHILD, "c.hxz");
    site.copy(BASE, BASE);
    site.say(
        "sandbox = 'require'\ndefault-export = 'c'\n[exports]\na = '{}/a.hxz'\nc = '{}/c.hxz'",
    );
    reload(&server, "now serving", 1);
    server.assert_alive();
    assert_eq!(server.greeted().list(), ["a", "c"]);
}

#[test]
fn the_file_is_watched() {
    let exports = format!("insecure-no-tls = true\n[exports]\na = '{{archives}}/{BASE}'");
    let site = Site::new(&format!("watch = true\n{exports}"));
    let server = site.server().start();
    site.say(&format!("watch = true\nlisen = 7\n{exports}"));
    wait_for(&server, "reload_failed", 1);
    replace(&site.path("rules"), "[[rule]]\naction = 'allow'");
    site.say(&format!("watch = true\nrules = '{{}}/rules'\n{exports}"));
    wait_for(&server, "reloaded", 1);
    server.assert_alive();
    // What it names by now is watched as well.
    replace(&site.path("rules"), "[[rule]]\naction = 'deny'");
    wait_for(&server, "reloaded", 2);
    assert!(server.connect().rest().0.is_empty());
    // And so is what it names when that can't be used.
    replace(&site.path("others"), "nonsense");
    site.say(&format!("watch = true\nrules = '{{}}/others'\n{exports}"));
    wait_for(&server, "reload_failed", 2);
    replace(&site.path("others"), "[[rule]]\naction = 'allow'");
    wait_for(&server, "reloaded", 3);
    server.assert_alive();
}
