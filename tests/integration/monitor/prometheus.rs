//! What Prometheus makes of the numbers.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{Answer, get, get_with, monitor_of};
use crate::support::pki::Pki;
use crate::support::server::Server;
use crate::support::{PATIENCE, wait_until};

const BASE: &str = "base-zstd.hxz";

/// A server of which there is something to count.
fn busy() -> Server {
    let server = Server::builder()
        .archive(BASE)
        .tls(Pki::new())
        .args(["--monitor", "0", "--audit", "-", "--allow", "127.0.0.1"])
        .start();
    server.connect_from([127, 0, 0, 2]).expect_closed();
    let mut client = server.go("");
    client.read_ok(0, 4096);
    assert!(client.read(u64::MAX - 512, 512).is_err());
    client.disconnect();
    server.signal("HUP");
    server.wait_for_log("it is reloaded", |line| line.json["dropped"].is_u64());
    server
}

/// The names of all numbers, as Prometheus knows them.
fn names(server: &Server) -> BTreeSet<String> {
    let metrics = get(server, "/metrics").body;
    let heads = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    heads.map(|head| head.split(' ').next().unwrap().to_owned()).collect()
}

/// Lets promtool check the metrics of a server.
#[track_caller]
pub(super) fn assert_valid(server: &Server) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped());
    let mut checking =
        promtool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("promtool");
    let metrics = get(server, "/metrics").body;
    checking.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let checked = checking.wait_with_output().unwrap();
    let said = [checked.stdout, checked.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&said), "");
    assert!(checked.status.success());
}

#[test]
fn promtool_finds_nothing_to_complain_of() {
    assert_valid(&busy());
}

/// Checks that both formats have the same numbers under the same names.
#[track_caller]
pub(super) fn assert_same_in_both_formats(server: &Server) {
    // But for the order of labels, and how numbers among them are written.
    let label = |label: &str| match label.strip_prefix("le=\"") {
        Some(bound) => bound.trim_end_matches('"').parse::<f64>().unwrap().to_string(),
        None => label.to_owned(),
    };
    let sample = |line: &str| {
        let (name, labels) = line.rsplit_once(' ').unwrap().0.split_once('{').unwrap_or((line, ""));
        let labels: BTreeSet<String> = labels.trim_end_matches('}').split(',').map(label).collect();
        (name.split(' ').next().unwrap().to_owned(), labels)
    };
    let samples = |text: &str| -> BTreeSet<_> {
        text.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
    };
    let older = samples(&get(server, "/metrics").body);
    let newer =
        get_with(server, "/metrics", "Accept: application/openmetrics-text; version=1.0.0\r\n");
    assert_eq!(samples(&newer.body), older);
}

#[test]
fn both_formats_say_the_same() {
    assert_same_in_both_formats(&busy());
}

/// `docs/metrics.md` names each number, and no other.
#[test]
fn all_numbers_are_documented() {
    let table = include_str!("../../../docs/metrics.md");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let is_name = |row: &&str| row.starts_with("hexz_nbd_") || row.starts_with("process_");
    let documented: BTreeSet<String> = rows.filter(is_name).map(str::to_owned).collect();
    let exposed = names(&busy());
    assert_eq!(documented, exposed);
}

/// A Prometheus that asks a server every second. It is killed when this is dropped.
struct Prometheus {
    child: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("prometheus.yml");
        let scrape = format!(
            "global: {{ scrape_interval: 1s }}\nscrape_configs:\n  - job_name: hexz-nbd\n    \
             static_configs: [{{ targets: [\"{target}\"] }}]\n"
        );
        std::fs::write(&config, scrape).unwrap();
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus");
        Self { child, address, _folder: folder }
    }

    /// What it answers to a question, if it answers already.
    fn ask(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        serde_json::from_str(&Answer::parse(&answer).body).ok()
    }

    /// The value of an expression that has one.
    fn value(&self, query: &str) -> Option<f64> {
        let answer = self.ask(&format!("/api/v1/query?query={query}"))?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }

    /// Whether it has a number of that name, or a histogram's.
    fn has(&self, name: &str) -> bool {
        [name.to_owned(), format!("{name}_count")].iter().any(|name| self.value(name).is_some())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_real_prometheus_scrapes_it() {
    let server = busy();
    let prometheus = Prometheus::start(&monitor_of(&server));
    wait_until("it has asked", || prometheus.value("hexz_nbd_ready") == Some(1.0));
    let reads = "hexz_nbd_requests_total%7Bcommand=%22read%22%7D";
    assert_eq!(prometheus.value(reads), Some(2.0));
    server.go("").read_ok(4096, 4096);
    wait_until("it has asked again", || prometheus.value(reads) == Some(3.0));
    // It took the format that it likes best, and everything in it.
    let targets = prometheus.ask("/api/v1/targets").unwrap();
    let target = &targets["data"]["activeTargets"][0];
    assert_eq!((target["health"].as_str(), target["lastError"].as_str()), (Some("up"), Some("")));
    let quantile = "histogram_quantile(0.5,hexz_nbd_read_latency_seconds_bucket)";
    assert!(prometheus.value(quantile).is_some_and(|seconds| seconds > 0.0 && seconds < 25.0));
    let metadata = prometheus.ask("/api/v1/metadata?metric=hexz_nbd_read_latency_seconds").unwrap();
    let known = &metadata["data"]["hexz_nbd_read_latency_seconds"][0];
    assert_eq!((&known["type"], &known["unit"]), (&"histogram".into(), &"seconds".into()));
    // Those of stores and of their disk cache have values only if there are any.
    let is_of_stores =
        |name: &str| name.starts_with("hexz_nbd_store_") || name.starts_with("hexz_nbd_disk_cache");
    let names = names(&server).into_iter().filter(|name| !is_of_stores(name));
    let names: BTreeSet<String> = names.filter(|name| !prometheus.has(name)).collect();
    assert_eq!(names, BTreeSet::from(["hexz_nbd_open_failures_total".to_owned()]));
}
