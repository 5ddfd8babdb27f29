//! What clients see of the servers, over raw sockets.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "helpers of tests"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use object_server::{
    Behavior, CredentialServer, Credentials, DelayProxy, ETag, Index, Issuer, Link, ObjectServer,
    Rule, Script,
};

/// A response as it came over the connection.
struct Received {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Received {
    fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.to_lowercase().starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Sends a request, and reads until the server closes the connection.
fn request(address: SocketAddr, method: &str, target: &str, headers: &[&str]) -> Received {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text =
        format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for header in headers {
        text += &format!("{header}\r\n");
    }
    stream.write_all(format!("{text}\r\n").as_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Received { status: 0, head: String::new(), body: bytes };
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Received { status, head, body: bytes[end + 4..].to_vec() }
}

fn get(server: &ObjectServer, target: &str, headers: &[&str]) -> Received {
    request(server.address(), "GET", target, headers)
}

/// A plain server with `/a/x` of 1000 bytes, which count up.
fn counting() -> (ObjectServer, Vec<u8>) {
    let bytes: Vec<u8> = (0..1000_u32).map(|number| (number % 251) as u8).collect();
    let server = ObjectServer::builder().start().unwrap();
    server.put("a/x", bytes.clone());
    (server, bytes)
}

#[test]
fn ranges_and_conditions_are_honored() {
    let (server, bytes) = counting();
    let whole = get(&server, "/a/x", &[]);
    assert_eq!((whole.status, &whole.body), (200, &bytes));
    let etag = whole.header("etag").unwrap().to_owned();
    let part = get(&server, "/a/x", &["Range: bytes=10-19"]);
    assert_eq!((part.status, &part.body[..]), (206, &bytes[10..20]));
    assert_eq!(part.header("content-range"), Some("bytes 10-19/1000"));
    let suffix = get(&server, "/a/x", &["Range: bytes=-5", &format!("If-Match: {etag}")]);
    assert_eq!((suffix.status, &suffix.body[..]), (206, &bytes[995..]));
    let beyond = get(&server, "/a/x", &["Range: bytes=1000-"]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */1000")));
    let head = request(server.address(), "HEAD", "/a/x", &[]);
    assert_eq!((head.header("content-length"), head.body.len()), (Some("1000"), 0));
    assert_eq!(get(&server, "/a/x", &["If-Match: \"other\""]).status, 412);
    assert_eq!(get(&server, "/a/x", &[&format!("If-None-Match: {etag}")]).status, 304);
    assert_eq!(get(&server, "/a/y", &[]).status, 404);
    server.put("a/x", vec![0; 10]);
    assert_eq!(get(&server, "/a/x", &[&format!("If-Match: {etag}")]).status, 412);
}

#[test]
fn requests_are_logged_and_counted() {
    let (server, _) = counting();
    get(&server, "/a/x", &["Range: bytes=0-99"]);
    get(&server, "/a/x", &["Range: bytes=50-149", "X-Note: seen"]);
    get(&server, "/missing", &[]);
    let totals = server.log().totals();
    assert_eq!((totals.requests, totals.data_requests, totals.errors), (3, 2, 1));
    assert_eq!((totals.data_bytes, totals.max_concurrency), (200, 1));
    assert_eq!(server.log().distinct_chunks(100), 2);
    let entry = server.log().entries_for("a/x").remove(1);
    assert_eq!((entry.number, entry.status, entry.served.clone()), (1, 206, Some(50..150)));
    assert_eq!((entry.header("x-note"), entry.requested_range()), (Some("seen"), Some(50..150)));
    assert!(entry.duration.is_some());
    server.log().clear();
    assert_eq!(server.log().totals().requests, 0);
}

#[test]
fn files_are_served_and_indexed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("images/old")).unwrap();
    std::fs::write(folder.path().join("images/a & b.hxz"), [1; 70_000]).unwrap();
    std::fs::write(folder.path().join("images/old/c.hxz"), b"c").unwrap();
    let server = ObjectServer::builder().folder(folder.path()).start().unwrap();
    let part = get(&server, "/images/a%20%26%20b.hxz", &["Range: bytes=65530-"]);
    assert_eq!((part.status, part.body), (206, vec![1; 4470]));
    assert_eq!(get(&server, "/images/../../etc/passwd", &[]).status, 404);
    let moved = get(&server, "/images", &[]);
    assert_eq!((moved.status, moved.header("location")), (301, Some("/images/")));
    let html = get(&server, "/images/", &[]);
    assert!(html.text().contains("<a href=\"a%20%26%20b.hxz\">a &amp; b.hxz</a>"));
    assert!(html.text().contains("<a href=\"old/\">old/</a>") && !html.text().contains("c.hxz"));
    let json = get(&server, "/images/", &["Accept: application/json"]);
    assert!(json.text().contains("\"name\":\"old\", \"type\":\"directory\""), "{}", json.text());
    let closed = ObjectServer::builder().folder(folder.path()).index(Index::Off).start().unwrap();
    assert_eq!(get(&closed, "/images/", &[]).status, 403);
}

#[test]
fn listings_are_paged() {
    let server = ObjectServer::builder().s3().start().unwrap();
    for key in ["v7/a.hxz", "v7/b<.hxz", "v7/old/c.hxz", "v7/old/d.hxz", "v8/e.hxz"] {
        server.put(&format!("golden/{key}"), vec![0; 3]);
    }
    let list = |query: &str| get(&server, &format!("/golden?list-type=2{query}"), &[]);
    let all = list("&prefix=v7%2F");
    assert!(all.text().contains("<KeyCount>4</KeyCount>"), "{}", all.text());
    assert!(all.text().contains("<Key>v7/b&lt;.hxz</Key>"));
    assert!(list("&encoding-type=url").text().contains("<Key>v7/b%3C.hxz</Key>"));
    let (mut query, mut names) = ("&prefix=v7/&delimiter=/&max-keys=2".to_owned(), Vec::new());
    loop {
        let page = list(&query);
        names.extend(page.text().split("<Key>").skip(1).map(|rest| rest[..4].to_owned()));
        names.extend(page.text().split("<Prefix>").skip(2).map(|rest| rest[..7].to_owned()));
        let Some((_, token)) = page.text().split_once("<NextContinuationToken>") else { break };
        let token = token.split('<').next().unwrap();
        query = format!("&prefix=v7/&delimiter=/&max-keys=2&continuation-token={token}");
        query = query.replace("&lt;", "%3C");
    }
    assert_eq!(names, ["v7/a", "v7/b", "v7/old/"]);
    let missing = get(&server, "/silver?list-type=2", &[]);
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("<Code>NoSuchBucket</Code>"));
    assert!(get(&server, "/golden/none", &[]).text().contains("<Code>NoSuchKey</Code>"));
}

#[test]
fn deviations_are_scripted() {
    let (server, bytes) = counting();
    let run = |behavior: Behavior| {
        server.set_script(Script::always(behavior));
        get(&server, "/a/x", &["Range: bytes=100-199"])
    };
    let throttled = run(Behavior::status(503).retry_after(7));
    assert_eq!((throttled.status, throttled.header("retry-after")), (503, Some("7")));
    let whole = run(Behavior::new().ignore_range());
    assert_eq!((whole.status, &whole.body), (200, &bytes));
    let cut = run(Behavior::new().truncate_after(30));
    assert_eq!((cut.header("content-length"), &cut.body[..]), (Some("100"), &bytes[100..130]));
    let short = run(Behavior::new().shorten_by(1));
    assert_eq!((short.header("content-length"), short.body.len()), (Some("99"), 99));
    assert_eq!(short.header("content-range"), Some("bytes 100-199/1000"));
    assert_eq!(run(Behavior::new().lengthen_by(5)).body.len(), 105);
    let wrong = run(Behavior::new().content_range("bytes 0-99/1000"));
    assert_eq!(wrong.header("content-range"), Some("bytes 0-99/1000"));
    let flipped = run(Behavior::new().flip_bit(150).flip_bit(300)).body;
    assert_eq!((flipped[50], &flipped[51..]), (bytes[150] ^ 1, &bytes[151..200]));
    assert_eq!(run(Behavior::new().forge(95, vec![9; 10])).body[..6], [9, 9, 9, 9, 9, bytes[105]]);
    assert!(run(Behavior::new().etag(ETag::Weak)).header("etag").unwrap().starts_with("W/\""));
    assert_eq!(run(Behavior::new().etag(ETag::Absent)).header("etag"), None);
    let moved = run(Behavior::redirect("http://127.0.0.1:1/"));
    assert_eq!((moved.status, moved.header("location")), (307, Some("http://127.0.0.1:1/")));
    let gzip = run(Behavior::new().gzip());
    assert_eq!(
        (gzip.header("content-encoding"), &gzip.body[..2]),
        (Some("gzip"), &[0x1f, 0x8b][..])
    );
    assert_eq!(run(Behavior::drop_connection()).status, 0);
    let started = Instant::now();
    let late = run(Behavior::new()
        .delay(Duration::from_millis(50))
        .pause_after(10, Duration::from_millis(50)));
    assert_eq!((late.body.len(), started.elapsed() >= Duration::from_millis(100)), (100, true));
    let old = run(Behavior::new().then_replace_object(vec![1; 500]));
    assert_eq!(
        (&old.body[..], old.header("content-range")),
        (&bytes[100..200], Some("bytes 100-199/1000"))
    );
    assert_eq!(run(Behavior::new()).header("content-range"), Some("bytes 100-199/500"));
}

#[test]
fn stalled_bodies_end_with_the_connection() {
    let (server, bytes) = counting();
    server.set_script(Script::always(Behavior::new().stall_after(300)));
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| get(&server, "/a/x", &[]));
        while server.log().totals().data_bytes < 300 {
            std::thread::sleep(Duration::from_millis(5));
        }
        server.disconnect_all();
        assert_eq!(stalled.join().unwrap().body, bytes[..300]);
    });
}

#[test]
fn rules_select_requests() {
    let (server, _) = counting();
    server.put("a/y", vec![1; 10]);
    let statuses = |count: usize, target: &str, headers: &[&str]| -> Vec<u16> {
        (0..count).map(|_| get(&server, target, headers).status).collect()
    };
    let rule = || Rule::new(Behavior::status(503));
    server.set_script(Script::new().rule(rule().path("a/x").percent(30)));
    let failed = statuses(10, "/a/x", &[]).iter().filter(|status| **status == 503).count();
    assert_eq!((failed, statuses(2, "/a/y", &[])), (3, vec![200, 200]));
    server.set_script(Script::new().rule(rule().skip(1).times(2)));
    assert_eq!(statuses(4, "/a/x", &[]), [200, 503, 503, 200]);
    server.set_script(Script::new().rule(rule().overlapping(100..200).method("GET")));
    assert_eq!(statuses(1, "/a/x", &["Range: bytes=199-300"]), [503]);
    assert_eq!(statuses(1, "/a/x", &["Range: bytes=200-300"]), [206]);
    server.set_script(Script::from_fn(|request| {
        if request.number % 2 == 0 { Behavior::status(429) } else { Behavior::new() }
    }));
    let mut both = statuses(2, "/a/x", &[]);
    both.sort_unstable();
    assert_eq!(both, [200, 429]);
}

#[test]
fn server_stops_and_restarts_on_its_port() {
    let (server, bytes) = counting();
    server.stop();
    assert!(TcpStream::connect(server.address()).is_err());
    server.restart().unwrap();
    assert_eq!(get(&server, "/a/x", &[]).body, bytes);
}

#[test]
fn signatures_and_tokens_are_required() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    issuer.add(Credentials::permanent("AKIATEST", "secret"));
    let server = ObjectServer::builder().credentials(&issuer).start().unwrap();
    server.put("golden/x", vec![0; 10]);
    let try_with = |key: &str, token: &str| {
        let authorization = format!(
            "Authorization: AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/s3/aws4_request, \
             SignedHeaders=host;x-amz-date, Signature=00"
        );
        let token = format!("X-Amz-Security-Token: {token}");
        let mut headers = vec![authorization.as_str(), "X-Amz-Date: 20260101T000000Z"];
        headers.push("X-Amz-Content-Sha256: UNSIGNED-PAYLOAD");
        headers.extend((!token.ends_with(": ")).then_some(token.as_str()));
        get(&server, "/golden/x", &headers);
        server.log().entries().pop().unwrap().error
    };
    assert_eq!(get(&server, "/golden/x", &[]).status, 403);
    assert_eq!(try_with("AKIAOTHER", ""), "InvalidAccessKeyId");
    assert_eq!(try_with("AKIATEST", ""), "SignatureDoesNotMatch");
    let temporary = issuer.issue();
    let token = temporary.session_token.unwrap();
    assert_eq!(try_with(&temporary.access_key_id, ""), "InvalidToken");
    assert_eq!(try_with(&temporary.access_key_id, &token), "SignatureDoesNotMatch");
    issuer.expire_all();
    assert_eq!(try_with(&temporary.access_key_id, &token), "ExpiredToken");
}

#[test]
fn credentials_are_issued() {
    let issuer = Issuer::new(Duration::from_secs(60));
    let server = CredentialServer::start(&issuer).unwrap();
    let ask =
        |method, path: &str, headers: &[&str]| request(server.address(), method, path, headers);
    assert!(
        ask("GET", "/v2/credentials", &[]).text().contains("\"AccessKeyId\":\"ASIATEST00000001\"")
    );
    server.require_authorization("secret");
    assert_eq!(ask("GET", "/v2/credentials", &[]).status, 401);
    assert_eq!(ask("GET", "/v2/credentials", &["Authorization: secret"]).status, 200);
    let folder = "/latest/meta-data/iam/security-credentials/";
    assert_eq!(ask("GET", folder, &[]).status, 401);
    let token = ask("PUT", "/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 60"]);
    let token = format!("X-aws-ec2-metadata-token: {}", token.text());
    let role = ask("GET", folder, &[&token]);
    let path = format!("{folder}{}", role.text());
    assert!(ask("GET", &path, &[&token]).text().contains("\"Code\":\"Success\""));
    server.require_web_identity("jwt");
    let role = "/?Action=AssumeRoleWithWebIdentity&RoleArn=a&RoleSessionName=b&WebIdentityToken=";
    assert_eq!(ask("POST", &format!("{role}old"), &[]).status, 400);
    assert!(ask("POST", &format!("{role}jwt"), &[]).text().contains("<SessionToken>"));
    assert_eq!(issuer.issued(), 4);
}

#[test]
fn https_presents_a_certificate_of_its_authority() {
    let server = ObjectServer::builder().https().start().unwrap();
    server.put("a/x", vec![5; 10]);
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, server.ca_pem().unwrap()).unwrap();
    let output = std::process::Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20", "--cacert"])
        .arg(&ca)
        .arg(server.url("a/x"))
        .output()
        .unwrap();
    assert_eq!(output.stdout, [5; 10], "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn proxy_delays_limits_and_refuses() {
    let (server, bytes) = counting();
    server.put("a/long", vec![1; 1 << 20]);
    let link = |milliseconds, bytes_per_second| Link {
        one_way_delay: Duration::from_millis(milliseconds),
        bytes_per_second,
    };
    let slow = DelayProxy::start(server.address(), link(20, None)).unwrap();
    let started = Instant::now();
    assert_eq!(request(slow.address(), "GET", "/a/x", &[]).body, bytes);
    // One round trip to connect, and one for the request.
    assert!(started.elapsed() >= Duration::from_millis(80), "{:?}", started.elapsed());
    assert!(slow.bytes_down() > 1000 && slow.bytes_up() > 30);
    slow.refuse();
    assert!(TcpStream::connect(slow.address()).is_err());
    slow.accept().unwrap();
    assert_eq!(request(slow.address(), "GET", "/a/x", &[]).body, bytes);
    let narrow = DelayProxy::start(server.address(), link(10, Some(4 << 20))).unwrap();
    for _ in 0..2 {
        // An idle link must not make up for lost time.
        std::thread::sleep(Duration::from_millis(20));
        let started = Instant::now();
        request(narrow.address(), "GET", "/a/x", &[]);
        assert!(started.elapsed() >= Duration::from_millis(40), "{:?}", started.elapsed());
    }
    let started = Instant::now();
    assert_eq!(request(narrow.address(), "GET", "/a/long", &[]).body.len(), 1 << 20);
    let seconds = started.elapsed().as_secs_f64();
    assert!((0.26..2.0).contains(&seconds), "{seconds}");
}
