//! `hexz-nbd doctor --store`: against stores that are healthy, and those that aren't.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use object_server::{Behavior, Credentials, ETag, Issuer, ObjectServer, Rule, Script};

use super::{Found, doctor, examine};
use crate::archive_writer::{ArchiveWriter, noise};
use crate::support::archive;
use crate::support::pki::write_secret;
use crate::support::server::run;

const KEY: &str = "golden/web.hxz";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG";

fn server() -> ObjectServer {
    let server = ObjectServer::builder().start().unwrap();
    server.put(KEY, fs::read(archive("base-zstd.hxz")).unwrap());
    server
}

fn scripted(behavior: Behavior) -> ObjectServer {
    let server = server();
    server.set_script(Script::always(behavior));
    server
}

fn check<A: Into<OsString>>(url: &str, args: impl IntoIterator<Item = A>) -> Found {
    let target = ["--store".into(), url.into()];
    examine(target.into_iter().chain(args.into_iter().map(Into::into)))
}

/// Checks the archive of a server over HTTP.
fn check_object(server: &ObjectServer) -> Found {
    check(&server.url(KEY), ["--no-speed"])
}

/// An S3 server, and a file with credentials for it.
struct S3 {
    server: ObjectServer,
    issuer: Issuer,
    folder: tempfile::TempDir,
}

impl S3 {
    fn new() -> Self {
        let issuer = Issuer::new(Duration::from_secs(3600));
        issuer.add(Credentials::permanent("AKIATEST", SECRET));
        let server = ObjectServer::builder().credentials(&issuer).start().unwrap();
        server.put(KEY, fs::read(archive("base-zstd.hxz")).unwrap());
        let s3 = Self { server, issuer, folder: tempfile::tempdir().unwrap() };
        s3.write(&Credentials::permanent("AKIATEST", SECRET));
        s3
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("credentials")
    }

    fn write(&self, credentials: &Credentials) {
        let mut text = format!(
            "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
            credentials.access_key_id, credentials.secret_access_key
        );
        if let Some(token) = &credentials.session_token {
            text += &format!("aws_session_token = {token}\n");
        }
        write_secret(&self.file(), &text);
    }

    fn args(&self) -> Vec<OsString> {
        let file = self.file().into_os_string();
        let endpoint = self.server.endpoint().into();
        vec!["--store-endpoint".into(), endpoint, "--store-credentials".into(), file]
    }

    fn check(&self, url: &str) -> Found {
        check(url, self.args())
    }
}

impl Found {
    /// All steps to the last one have been made, and none has failed.
    #[track_caller]
    fn assert_usable(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{:#}", self.report);
        for name in ["object", "ranges", "conditions", "header", "latency"] {
            self.assert_outcome(name, "good");
        }
        self
    }

    #[track_caller]
    fn assert_warns(&self, name: &str, reason: &str, side: &str) -> &Self {
        self.assert_outcome(name, "warning").assert_advice(name, reason, side)
    }
}

#[test]
fn healthy_http_server() {
    let server = server();
    let found = check(&server.url(KEY), ["--timeout", "10s"]);
    found.assert_usable();
    assert_eq!(found.report["outcome"], "good", "{:#}", found.report);
    assert_eq!(found.report["target"], server.url(KEY));
    assert_eq!(found.detail("URL", "key"), KEY);
    assert_eq!(found.detail("credentials", "source"), "none");
    assert_eq!(found.detail("ranges", "suffix"), true);
    assert_eq!(found.detail("conditions", "if_match"), true);
    assert_eq!(found.detail("conditions", "if_none_match"), true);
    assert_eq!(found.detail("header", "parents"), 0);
    let length = fs::metadata(archive("base-zstd.hxz")).unwrap().len();
    assert_eq!(found.detail("object", "length"), length);
    assert_eq!(found.detail("rate", "bytes"), length.min(8 << 20));
    assert!(found.detail("latency", "median_seconds").as_f64().unwrap() > 0.0);
    assert!(!found.has("TLS") && !found.has("name"));

    let ended = doctor(["--store", &server.url(KEY)]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.lines().any(|line| line.starts_with("✓ object: ")), "{}", ended.stdout);
}

#[test]
fn healthy_https_server() {
    let server = ObjectServer::builder().https().start().unwrap();
    server.put(KEY, fs::read(archive("base-zstd.hxz")).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    fs::write(&ca, server.ca_pem().unwrap()).unwrap();
    let url = server.url(KEY).replace("127.0.0.1", "localhost");
    let args: [OsString; 2] = ["--store-ca".into(), ca.into()];
    let found = check(&url, args);
    found.assert_usable();
    assert_eq!(found.detail("TLS", "version"), "TLS 1.3");
    assert!(found.detail("certificate", "not_after").is_string());
    let names = found.detail("certificate", "names").as_array().unwrap();
    assert!(names.contains(&"localhost".into()), "{names:?}");

    // The CAs of the system, or those of a wrong file.
    let wrong = crate::support::pki::Pki::new();
    let args: [OsString; 2] = ["--store-ca".into(), wrong.ca_cert().into()];
    let found = check(&url, args);
    found.assert_ends("certificate", "unknown_ca", "client");
    assert!(found.detail("certificate", "issuer").as_str().unwrap().contains("object-server"));
}

#[test]
fn healthy_s3_store() {
    let s3 = S3::new();
    let found = s3.check("s3://golden/web.hxz");
    found.assert_usable();
    assert_eq!(found.report["outcome"], "good", "{:#}", found.report);
    let source = found.detail("credentials", "source").as_str().unwrap();
    assert!(source.contains("the profile default"), "{source}");
    assert_eq!(found.report["target"], "s3://golden/web.hxz");
}

#[test]
fn folders_are_listed() {
    let s3 = S3::new();
    s3.server.put("golden/a.txt", "text");
    let found = s3.check("s3://golden/");
    found.assert_usable();
    assert_eq!(found.detail("list", "objects"), 2);

    let server = server();
    let found = check(&server.url("golden/"), ["--no-speed"]);
    found.assert_usable();
    assert_eq!(found.detail("list", "names")[0], "web.hxz");

    server.set_script(Script::always(Behavior::status(403)));
    check(&server.url("golden/"), ["--no-speed"]).assert_ends("list", "unsupported", "server");
    s3.server.set_script(Script::always(Behavior::status(403)));
    s3.check("s3://golden/").assert_ends("list", "denied", "server");
    s3.server.set_script(Script::new());
    s3.check("s3://golden/none/").assert_ends("list", "empty_folder", "client");
}

#[test]
fn parents_and_tree_files_are_looked_for_beside_the_archive() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("child.hxz");
    fs::copy(archive("child-zstd.hxz"), &path).unwrap();
    let server = server();
    let url = server.url("golden/child.hxz");
    server.put("golden/child.hxz", fs::read(&path).unwrap());
    let found = check(&url, ["--no-speed"]);
    found.assert_usable().assert_warns("parents", "parent_not_beside", "server");
    let parent = found.detail("parents", "names")[0].as_str().unwrap().to_owned();
    server.put(&format!("golden/{parent}"), fs::read(archive("base-zstd.hxz")).unwrap());
    check(&url, ["--no-speed"]).assert_usable().assert_outcome("parents", "good");

    let path = folder.path().join("large.hxz");
    ArchiveWriter::of_image(&noise(1, 1 << 20), 65_536).write().save(&path);
    let tree = folder.path().join("large.hxz.tree");
    let ended = run(["tree".into(), path.clone().into_os_string()]);
    let digest = ended.stdout.split_whitespace().next().unwrap().to_owned();
    server.put("golden/large.hxz", fs::read(&path).unwrap());
    let url = server.url("golden/large.hxz");
    let found = check(&url, ["--no-speed"]);
    assert_eq!(found.assert_usable().detail("tree file", "found"), false);
    server.put("golden/large.hxz.tree", fs::read(&tree).unwrap());
    let found = check(&url, ["--no-speed"]);
    found.assert_usable();
    assert_eq!(found.detail("tree file", "blake3"), &digest[..]);

    let mut other = fs::read(&tree).unwrap();
    other[16] ^= 1;
    for wrong in [other, b"text".to_vec()] {
        server.put("golden/large.hxz.tree", wrong);
        check(&url, ["--no-speed"]).assert_warns("tree file", "wrong_tree", "server");
    }
}

#[test]
fn unusable_urls_and_options_are_named() {
    for (url, args, reason) in [
        ("file:///etc/passwd", vec![], "invalid_url"),
        ("https://user:hunter2@h/k", vec![], "invalid_url"),
        ("http://192.0.2.1/k", vec![], "plain_http"),
        ("s3://b/k", vec!["--store-endpoint", "no url"], "invalid_options"),
        ("https://h/k", vec!["--store-ca", "/nowhere"], "invalid_options"),
        ("az://c/k", vec![], "invalid_options"),
    ] {
        let found = check(url, args);
        found.assert_ends("URL", reason, "client");
        assert!(!found.report.to_string().contains("hunter2"));
    }
    let args = ["--store-credentials", "/nowhere", "--store-endpoint"];
    let server = server();
    let found = check("s3://b/k", args.into_iter().chain([server.endpoint().as_str()]));
    found.assert_ends("credentials", "no_credentials", "client");
}

#[test]
fn store_excludes_a_server_and_its_options() {
    for args in [
        vec!["doctor", "--store", "https://h/k", "localhost"],
        vec!["doctor", "--store", "https://h/k", "--no-tls"],
        vec!["doctor", "localhost", "--store-region", "x"],
        vec!["doctor", "localhost", "--store-insecure"],
        vec!["doctor"],
    ] {
        assert_eq!(run(&args).code, Some(2), "{args:?}");
    }
}

#[test]
fn servers_that_cannot_be_reached() {
    let found = check("https://store.invalid/web.hxz", ["--store-proxy", "none"]);
    found.assert_ends("name", "unresolved", "client");
    let server = server();
    server.stop();
    check_object(&server).assert_ends("connection", "connection_refused", "server");
    let proxy = server.endpoint();
    let args = ["--store-proxy", proxy.as_str()];
    check("https://192.0.2.1/k", args).assert_ends("connection", "connection_refused", "client");
    // Neither a proxy nor TLS.
    server.restart().unwrap();
    check("https://192.0.2.1/k", args).assert_ends("proxy", "proxy_refused", "network");
    let url = server.url(KEY).replace("http:", "https:");
    check(&url, ["--no-speed"]).assert_ends("TLS", "not_tls", "client");
}

#[test]
fn objects_that_may_not_be_read() {
    let server = scripted(Behavior::status(403));
    check_object(&server).assert_ends("object", "denied", "client");
    server.set_script(Script::new());
    let found = check(&server.url("golden/none.hxz"), ["--no-speed"]);
    found.assert_ends("object", "not_found", "client");
    assert_eq!(found.detail("object", "status"), 404);
    for (status, reason) in [(503, "throttled"), (500, "server_error"), (418, "unsupported")] {
        server.set_script(Script::always(Behavior::status(status)));
        check_object(&server).assert_ends("object", reason, "server");
    }
    server.set_script(Script::always(Behavior::drop_connection()));
    check_object(&server).assert_ends("object", "interrupted", "network");

    let s3 = S3::new();
    s3.write(&Credentials::permanent("AKIATEST", "wrong"));
    s3.check("s3://golden/web.hxz").assert_ends("object", "denied", "server");
}

#[test]
fn redirects_name_what_to_configure() {
    let behavior = Behavior::redirect("https://elsewhere.example/golden/web.hxz?sig=s3cret");
    let found = check_object(&scripted(behavior));
    found.assert_ends("object", "redirected", "client");
    assert_eq!(found.detail("object", "host"), "elsewhere.example");
    assert!(!found.report.to_string().contains("s3cret"));

    let s3 = S3::new();
    let moved =
        Behavior::error(301, "PermanentRedirect").header("x-amz-bucket-region", "eu-west-3");
    s3.server.set_script(Script::always(moved));
    let found = s3.check("s3://golden/web.hxz");
    found.assert_ends("object", "wrong_region", "client");
    assert_eq!(found.detail("object", "region"), "eu-west-3");
}

#[test]
fn missing_ranges_are_noticed() {
    let behavior = Behavior::new().ignore_range();
    check_object(&scripted(behavior.clone())).assert_ends("ranges", "no_ranges", "server");
    // Only for ranges that don't begin at zero, as of a cache.
    let server = server();
    let rule = Rule::new(behavior).ranged(true).skip(1);
    server.set_script(Script::new().rule(rule));
    check_object(&server).assert_ends("ranges", "no_ranges", "server");
    let behavior = Behavior::new().content_range("bytes 1-262144/9999999");
    check_object(&scripted(behavior)).assert_ends("ranges", "wrong_range", "server");
    for status in [416, 501] {
        let suffix = Rule::new(Behavior::status(status)).header("range", "bytes=-");
        server.set_script(Script::new().rule(suffix));
        check_object(&server).assert_warns("ranges", "no_suffix_ranges", "server");
    }
}

#[test]
fn weak_identities_are_noticed() {
    let without = Behavior::new().etag(ETag::Absent).without_header("last-modified");
    check_object(&scripted(without)).assert_ends("identity", "no_identity", "server");
    let weak = Behavior::new().etag(ETag::Weak).without_header("last-modified");
    let found = check_object(&scripted(weak));
    found.assert_ends("identity", "no_identity", "server");
    assert_eq!(found.detail("identity", "weak_etag"), true);
    let weak = Behavior::new().etag(ETag::Weak);
    check_object(&scripted(weak)).assert_warns("identity", "weak_etag", "server");
    let absent = Behavior::new().etag(ETag::Absent);
    check_object(&scripted(absent)).assert_warns("identity", "no_etag", "server");
    // As of several servers behind one name.
    let server = server();
    let other = Behavior::new().etag(ETag::Other("\"other\"".to_owned()));
    server.set_script(Script::new().rule(Rule::new(other).percent(50)));
    check_object(&server).assert_ends("ranges", "unstable_identity", "server");
}

#[test]
fn ignored_conditions_are_no_problem() {
    let found = check_object(&scripted(Behavior::new().ignore_conditions()));
    found.assert_usable();
    assert_eq!(found.report["outcome"], "good");
    assert_eq!(found.detail("conditions", "if_match"), false);
    assert_eq!(found.detail("conditions", "if_none_match"), false);
}

#[test]
fn expired_credentials_are_noticed() {
    let s3 = S3::new();
    s3.write(&s3.issuer.issue());
    s3.check("s3://golden/web.hxz").assert_usable();
    s3.issuer.expire_all();
    let found = s3.check("s3://golden/web.hxz");
    found.assert_ends("object", "credentials_expired", "client");

    let server = server();
    let query = "?X-Amz-Date=20201130T041600Z&X-Amz-Expires=3600&X-Amz-Signature=s3cret";
    let found = check(&format!("{}{query}", server.url(KEY)), ["--no-speed"]);
    found.assert_ends("credentials", "credentials_expired", "client");
    assert_eq!(found.detail("credentials", "expires"), "2020-11-30T05:16:00Z");
    assert!(!found.report.to_string().contains("s3cret"));
}

#[test]
fn wrong_clocks_are_noticed() {
    let in_past = |minutes: u64| {
        let then = SystemTime::now() - Duration::from_secs(60 * minutes);
        let date = time::OffsetDateTime::from(then);
        let weekday = &date.weekday().to_string()[..3];
        let month = &date.month().to_string()[..3];
        let (day, year) = (date.day(), date.year());
        let (hour, minute, second) = date.to_hms();
        format!("{weekday}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT")
    };
    let found = check_object(&scripted(Behavior::new().header("date", &in_past(5))));
    found.assert_usable().assert_warns("clock", "clock_skew", "client");
    let seconds = found.detail("clock", "seconds").as_i64().unwrap();
    assert!((299..=330).contains(&seconds), "{seconds}");
    // Only requests with signatures fail then.
    let found = check_object(&scripted(Behavior::new().header("date", &in_past(60))));
    found.assert_usable().assert_warns("clock", "clock_skew", "client");
    let s3 = S3::new();
    let skewed = Behavior::error(403, "RequestTimeTooSkewed").header("date", &in_past(60));
    s3.server.set_script(Script::always(skewed));
    s3.check("s3://golden/web.hxz").assert_ends("clock", "clock_skew", "client");
}

#[test]
fn compressed_responses_are_noticed() {
    let found = check_object(&scripted(Behavior::new().gzip()));
    found.assert_ends("encoding", "compressed", "server");
    assert_eq!(found.detail("encoding", "encoding"), "gzip");
}

#[test]
fn slow_servers_are_noticed() {
    let server = scripted(Behavior::new().delay(Duration::from_millis(150)));
    let found = check_object(&server);
    found.assert_warns("latency", "high_latency", "network");
    server.set_script(Script::always(Behavior::new().stall_after(100)));
    let found = check(&server.url(KEY), ["--timeout", "1s"]);
    found.assert_ends("object", "timed_out", "server");
    // Only the last requests are slow.
    server.put(KEY, ArchiveWriter::of_image(&noise(1, 2 << 20), 65_536).write().bytes);
    let slow = Rule::new(Behavior::new().delay(Duration::from_millis(2500))).skip(18);
    server.set_script(Script::new().rule(slow));
    let found = check::<&str>(&server.url(KEY), []);
    found.assert_warns("rate", "low_rate", "network");
}

#[test]
fn other_objects_than_archives_are_recognized() {
    let server = server();
    for (content, reason) in [
        (&b"<html><body>Please log in</body></html>"[..], "not_hexz"),
        (b"HEXZ", "truncated"),
        (b"\0\x01", "not_hexz"),
        (b"", "not_hexz"),
    ] {
        server.put(KEY, content);
        let side = if reason == "not_hexz" { "client" } else { "server" };
        check_object(&server).assert_ends("header", reason, side);
    }
}

#[test]
fn secrets_are_not_shown() {
    let s3 = S3::new();
    let ended = {
        let args = s3.args();
        doctor(["--store".into(), "s3://golden/web.hxz".into()].into_iter().chain(args))
    };
    let query = "?token=s3cret-query";
    let signed = doctor(["--store", &format!("{}{query}", server().url(KEY))]);
    for output in [&ended.stdout, &ended.stderr, &signed.stdout, &signed.stderr] {
        assert!(!output.contains("s3cret-query") && !output.contains(SECRET), "{output}");
    }
}
