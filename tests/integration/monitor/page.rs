//! The status page, in a real browser.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{get, monitor_of};
use crate::admission::come_in;
use crate::clients::run;
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{FLAGS, OPT_GO, REP_ERR_UNKNOWN, Request, info_data};
use crate::support::pki::{Pki, Recipe as PkiRecipe};
use crate::support::server::Server;
use crate::support::{archive, wait_until};

/// What a stranger may have as a name in a certificate.
const EVIL: &str = "<img src=x onerror=alert(1)>\u{202e}";

/// The page after it has run for so long, as the browser's own text of it without places where
/// names may be wrapped, and what the browser had to say. Time is the browser's: it passes as soon
/// as there is nothing to wait for.
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
    (unwrapped(&said.ok()), console.join("\n"))
}

/// Removes the elements that say where names may be wrapped, and where not.
fn unwrapped(page: &str) -> String {
    let page = page.replace("<wbr>", "");
    let mut parts = page.split("<span class=\"solid\">");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |page, part| page + &part.replacen("</span>", "", 1))
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
    // Name, rate, errors, requests, readers, p50, p99, all that was read, size, description.
    assert_eq!(exports[0][0], "base-zstd.hxz");
    assert_eq!((exports[0][2].as_str(), exports[0][4].as_str()), ("0", "2"));
    assert_eq!((exports[0][7].as_str(), exports[0][8].as_str()), ("512 KiB", "8.0 MiB"));

    let connections = rows(&page, "connections");
    let mut who: Vec<&str> = connections.iter().map(|row| row[0].as_str()).collect();
    who.sort_unstable();
    // Text, and nothing that turns what follows.
    assert_eq!(who, [r"cn:&lt;img src=x onerror=alert(1)&gt;\u{202e}", "dns:backup.example.org"]);
    assert!(!page.contains("<img"), "{page}");
    // Identity, rate, errors, requests, export, peer, in flight, all that was read, duration, TLS,
    // state.
    for row in &connections {
        assert_eq!(row[4..6], ["base-zstd.hxz", "127.0.0.1"]);
        assert_eq!(row[9..], ["TLS 1.3", "reading"]);
    }
    assert!(text(&page, "connections-count").starts_with("2 reading, 0 negotiating"), "{page}");
    assert!(is_hidden(&page, "stores-section") && is_hidden(&page, "fetched-section"), "{page}");
}

/// Returns the points of the curve of a plot, by its title.
fn curve(page: &str, plot: &str) -> Vec<(f64, f64)> {
    let start = page.find(&format!("<div class=\"soft\">{plot}</div>")).expect(plot);
    let path = page[start..].split_once("class=\"curve\"").unwrap().1;
    let path = path.split_once("d=\"").unwrap().1.split('"').next().unwrap();
    let points = path.split(['M', 'L']).filter_map(|point| point.split_once(' '));
    points.map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
}

#[test]
fn a_page_that_was_just_opened_shows_the_last_minutes() {
    let server = Server::builder().archive("base-zstd.hxz").args(["--monitor", "0"]).start();
    let mut client = server.go("");
    client.read_ok(0, 65_536);
    let samples = || status_of(&server, "/history.json")["samples"].as_array().unwrap().len();
    wait_until("there are three samples", || samples() >= 3);
    // A second is one request of the page.
    let (page, console) = browse(&format!("http://{}/", monitor_of(&server)), 1);
    assert_eq!(console, "", "{page}");
    let points = curve(&page, "Connections");
    assert!(points.len() >= 2, "{points:?}");
    // The samples are 5 seconds apart, of 15 minutes.
    assert!(points[0].0 < 896.0 && points.last().unwrap().0 > 899.0, "{points:?}");
    assert!(page.contains("15 min ago"), "{page}");
}

#[test]
fn the_banner_names_the_worst_problem() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("broken.hxz"), "junk").unwrap();
    std::fs::copy(archive("base-zstd.hxz"), folder.path().join("good.hxz")).unwrap();
    std::fs::copy(archive("base-lz4.hxz"), folder.path().join("unread.hxz")).unwrap();
    std::fs::copy(archive("child-zstd.hxz"), folder.path().join("thin.hxz")).unwrap();
    std::fs::write(folder.path().join("OTHER.HXZ"), "").unwrap();
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, "[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.0/8\"").unwrap();
    let certificate = PkiRecipe { days: (-1, 3), ..PkiRecipe::default() };
    let authority = Authority::new();
    let dns = Some("backup.example.org");
    let client = Recipe { dns, seconds: (-90 * 86_400, 5 * 86_400 + 60), ..Recipe::default() };
    let client = authority.certify(&client);
    let server = Server::builder()
        .tls(Pki::made_by(&certificate))
        .clients_of(&authority)
        .args(["--monitor", "0", "--export-dir"])
        .arg(folder.path())
        .arg("--rules")
        .arg(&rules)
        .start();
    let mut client = come_in(&server, client.config(server.pki()));
    for name in [b"broken.hxz".as_slice(), b"thin.hxz"] {
        client.refused(OPT_GO, &info_data(name, &[]), REP_ERR_UNKNOWN);
    }
    client.go("good.hxz");
    std::fs::write(&rules, "nonsense").unwrap();
    server.signal("HUP");
    let problems = || -> Vec<(Value, Value)> {
        let status = status_of(&server, "/status.json");
        let problems = status["problems"].as_array().unwrap().iter();
        problems.map(|it| (it["severity"].clone(), it["problem"].clone())).collect()
    };
    let expected = [
        ("critical", "certificate"),
        ("warning", "client_certificate"),
        ("warning", "archives"),
        ("warning", "reload"),
    ];
    let expected = expected.map(|(severity, problem)| (severity.into(), problem.into()));
    wait_until("all is noticed", || problems() == expected);

    let (page, console) = browse(&format!("http://{}/", monitor_of(&server)), 1);
    assert_eq!(console, "", "{page}");
    assert!(page.contains("<div id=\"banner\" class=\"bad\">"), "{page}");
    assert!(text(&page, "state").starts_with("The server's certificate expires in"), "{page}");
    let others = page.split("id=\"problems\"").nth(1).unwrap().split("</ul>").next().unwrap();
    for text in [
        "The certificate of the client dns:backup.example.org expires in 5&nbsp;days: renew it",
        "2 archives can't be opened: broken.hxz (not a Hexz archive), thin.hxz (parent is missing)",
        "so the previous settings apply: ",
    ] {
        assert!(others.contains(text), "{text}: {others}");
    }
    assert_eq!(text(&page, "host"), gethostname().trim());
    assert_eq!(
        pairs(&page, "archives")[..2],
        [["folder", folder.path().to_str().unwrap(), ""], ["archives in it", "4", ""],]
    );
    assert_eq!(text(&page, "contents-count"), "4 archives, 1 file that isn’t served");
    assert_eq!(
        pairs(&page, "contents"),
        [
            ["broken.hxz", "not a Hexz archive", "not_hexz"],
            ["good.hxz", "open", ""],
            ["thin.hxz", "parent is missing", "parent_missing"],
            ["unread.hxz", "not open", ""],
            ["OTHER.HXZ", "not served: extension isn't in lower case", "wrong_extension"],
        ]
    );
    let tls = pairs(&page, "tls");
    assert!(tls.iter().any(|[name, ..]| *name == "dns:backup.example.org expires"), "{tls:?}");
}

/// The names and values of a list, with their labels.
fn pairs<'a>(page: &'a str, list: &str) -> Vec<[&'a str; 3]> {
    let start = page.find(&format!("id=\"{list}\"")).unwrap_or_else(|| panic!("{page}"));
    let rows = page[start..].split("</dl>").next().unwrap().split("<div").skip(1);
    rows.map(|row| {
        let (start, rest) = row.split_once("<dt>").unwrap();
        let (name, rest) = rest.split_once("</dt>").unwrap();
        let value = rest.split_once('>').unwrap().1.split('<').next().unwrap();
        let label =
            start.split_once("title=\"").map_or("", |(_, it)| it.split('"').next().unwrap());
        [name, value, label]
    })
    .collect()
}

/// The script that takes the pictures clicks on what can be clicked, too.
#[test]
fn columns_are_sorted_both_ways_and_pictures_can_be_taken() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/status-page/pictures.py");
    let folder = tempfile::tempdir().unwrap();
    // A deadline of its own: it ends its browser and its server then.
    let output = Command::new("timeout")
        .arg("180")
        .arg(script)
        .arg(env!("CARGO_BIN_EXE_hexz-nbd"))
        .arg(folder.path())
        .arg("--check")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let picture = std::fs::read(folder.path().join("check.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG"), "{} bytes", picture.len());
}

fn gethostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap()
}

fn status_of(server: &Server, target: &str) -> Value {
    serde_json::from_str(&get(server, target).body).unwrap()
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
