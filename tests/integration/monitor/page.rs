//! The status page, in a real browser.

use std::path::Path;

use super::monitor_of;
use crate::clients::run;
use crate::support::authority::{Authority, Recipe};
use crate::support::client::FLAGS;
use crate::support::client::Request;
use crate::support::pki::Pki;
use crate::support::server::Server;

/// What a stranger may have as a name in a certificate.
const EVIL: &str = "<img src=x onerror=alert(1)>\u{202e}";

/// The page after it has run for so long, as the browser's own text of it, and what the browser
/// had to say. Time is the browser's: it passes as soon as there is nothing to wait for.
pub(super) fn browse(url: &str, seconds: u32) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let (profile, time) = (
        format!("--user-data-dir={}", folder.path().display()),
        format!("--virtual-time-budget={}", 1000 * seconds),
    );
    let quiet = ["--disable-background-networking", "--disable-component-update"];
    let alone = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
    let fresh = ["--no-first-run", "--disable-sync", "--disable-quic", &profile];
    let asked = ["--window-size=360,800", "--enable-logging=stderr", &time, "--dump-dom", url];
    let said = run("chromium", &[&quiet[..], &alone, &fresh, &asked].concat());
    let all = said.everything();
    let console: Vec<&str> = all.lines().filter(|line| line.contains(":CONSOLE")).collect();
    (said.ok(), console.join("\n"))
}

/// The text of the table's cells, row by row.
pub(super) fn rows(page: &str, table: &str) -> Vec<Vec<String>> {
    let start = page.find(&format!("id=\"{table}\"")).unwrap_or_else(|| panic!("{page}"));
    let body = page[start..].split("</table>").next().unwrap();
    let body = body.split("<tbody>").nth(1).unwrap();
    let inside =
        |cell: &str| cell.split_once('>').unwrap().1.split("</td>").next().unwrap().to_owned();
    body.split("<tr>").skip(1).map(|row| row.split("<td").skip(1).map(inside).collect()).collect()
}

/// The text of an element without others in it.
pub(super) fn text<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("{page}"));
    page[start..].split_once('>').unwrap().1.split('<').next().unwrap()
}

/// Returns true if an element has the attribute `hidden`.
pub(super) fn is_hidden(page: &str, id: &str) -> bool {
    let start = page.find(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("{page}"));
    page[start..].split('>').next().unwrap().contains("hidden")
}

#[test]
fn it_shows_what_is_served_and_who_reads_it() {
    let authority = Authority::new();
    let evil = authority.certify(&Recipe { name: EVIL, ..Recipe::default() });
    let good = Recipe { dns: Some("backup.example.org"), ..Recipe::default() };
    let good = authority.certify(&good);
    let server = Server::builder()
        .archive("base-zstd.hxz")
        .tls(Pki::new())
        .clients_of(&authority)
        .args(["--monitor", "127.0.0.1:0"])
        .start();
    let mut clients: Vec<_> = [&evil, &good]
        .map(|who| {
            let mut client = server.connect();
            client.greet(FLAGS);
            let mut client = client.starttls(who.config(server.pki()));
            client.go("base-zstd.hxz");
            client
        })
        .into();
    for _ in 0..8 {
        clients[1].send_request(Request::read(1, 0, 65_536));
        assert_eq!(clients[1].simple_reply().error, 0);
        clients[1].receive(65_536);
    }

    let (page, console) = browse(&format!("http://{}/", monitor_of(&server)), 5);
    assert_eq!(console, "", "{page}");
    assert!(text(&page, "state").starts_with("Ready. Up "), "{page}");
    assert_eq!(text(&page, "version"), env!("CARGO_PKG_VERSION"));

    let exports = rows(&page, "exports");
    assert_eq!(exports.len(), 1, "{page}");
    // Name, description, size, readers, rate, requests, p50, p99, all that was read, errors.
    assert_eq!(exports[0][0], "base-zstd.hxz");
    assert_eq!((exports[0][2].as_str(), exports[0][3].as_str()), ("8.0 MiB", "2"));
    assert_eq!((exports[0][8].as_str(), exports[0][9].as_str()), ("512 KiB", "0"));

    let connections = rows(&page, "connections");
    let mut who: Vec<&str> = connections.iter().map(|row| row[0].as_str()).collect();
    who.sort_unstable();
    // Text, and nothing that turns what follows.
    assert_eq!(who, [r"cn:&lt;img src=x onerror=alert(1)&gt;\u{202e}", "dns:backup.example.org"]);
    assert!(!page.contains("<img"), "{page}");
    for row in &connections {
        assert_eq!(row[1..5], ["127.0.0.1", "base-zstd.hxz", "reading", "TLS 1.3"]);
    }
    assert!(text(&page, "connections-count").starts_with("2 reading, 0 negotiating"), "{page}");
    assert!(is_hidden(&page, "stores-section") && is_hidden(&page, "fetched-section"), "{page}");
}

/// What the page asks for is all that it needs, and it needs nothing from elsewhere.
#[test]
fn it_is_one_file() {
    let page = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/monitor/page.html"),
    )
    .unwrap();
    for forbidden in [
        "//cdn",
        "https://",
        "http://",
        "<link",
        "import ",
        "innerHTML",
        "insertAdjacentHTML",
        "outerHTML",
        "document.write",
        "eval(",
    ] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
}
