//! The Grafana dashboard and the alerts in examples/, against what is really shown.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::get;
use crate::clients::run;
use crate::support::pki::Pki;
use crate::support::server::Server;

fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// All queries of the dashboard, those of its variables included.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                match (name.as_str(), member) {
                    ("expr" | "definition", Value::String(query)) => found.push(query.clone()),
                    _ => queries(member, found),
                }
            }
        }
        Value::Array(members) => members.iter().for_each(|member| queries(member, found)),
        _ => {}
    }
}

/// The metrics that are mentioned.
fn metrics(text: &str) -> BTreeSet<String> {
    let starts = ["hexz_nbd_", "process_"].into_iter();
    let starts = starts.flat_map(|prefix| text.match_indices(prefix).map(|(start, _)| start));
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    starts.map(|start| text[start..].chars().take_while(|c| is_name(*c)).collect()).collect()
}

/// The metrics that there are, also those that have no value yet.
fn shown() -> BTreeSet<String> {
    let server = Server::builder()
        .archive("base-zstd.hxz")
        .tls(Pki::new())
        .args(["--monitor", "127.0.0.1:0"])
        .start();
    let text = get(&server, "/metrics").body;
    let mut names = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        names.insert(name.to_owned());
        if kind == "histogram" {
            names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")));
        }
    }
    names
}

#[test]
fn the_dashboard_asks_for_what_there_is() {
    let dashboard = fs::read_to_string(in_repository("examples/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let mut found = Vec::new();
    queries(&dashboard, &mut found);
    assert!(found.len() > 40, "{found:?}");

    let (asked, shown) = (metrics(&found.join("\n")), shown());
    let missing: Vec<_> = asked.difference(&shown).collect();
    assert!(missing.is_empty(), "{missing:?} aren't among {shown:?}");
    // Everything that is shown has its place, too.
    let families = shown
        .iter()
        .filter(|name| !["_bucket", "_sum", "_count"].iter().any(|end| name.ends_with(end)));
    let unseen: Vec<_> =
        families.filter(|name| !asked.iter().any(|it| it.starts_with(*name))).collect();
    assert!(unseen.is_empty(), "the dashboard shows nothing of {unseen:?}");

    // As rules, since that is how promtool takes expressions; Grafana's variables have values.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("expressions.json");
    let rules: Vec<Value> = found
        .iter()
        .filter(|query| !query.starts_with("label_values("))
        .enumerate()
        .map(|(number, query)| {
            let expression = query
                .replace("$__rate_interval", "5m")
                .replace("$job", ".*")
                .replace("$instance", ".*");
            assert!(!expression.contains('$'), "{expression}");
            serde_json::json!({ "record": format!("query_{number}"), "expr": expression })
        })
        .collect();
    let rules = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    fs::write(&file, rules.to_string()).unwrap();
    run("promtool", &["check", "rules", file.to_str().unwrap()]).ok();
}

#[test]
fn panels_do_not_overlap_and_have_their_own_numbers() {
    let dashboard = fs::read_to_string(in_repository("examples/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let (mut numbers, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        // A panel without data isn't broken.
        let no_value = &panel["fieldConfig"]["defaults"]["noValue"];
        assert!(panel["type"] == "row" || no_value == "none", "{panel}");
        assert!(numbers.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let [x, y, w, h] =
            ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(x + w <= 24, "{panel}");
        for cell in (x..x + w).flat_map(|column| (y..y + h).map(move |row| (column, row))) {
            assert!(taken.insert(cell), "{panel}");
        }
    }
}

#[test]
fn the_alerts_ask_for_what_there_is_and_go_off_when_they_should() {
    let rules = in_repository("examples/prometheus-rules.yml");
    let (asked, shown) = (metrics(&fs::read_to_string(&rules).unwrap()), shown());
    let missing: Vec<_> = asked.difference(&shown).collect();
    assert!(missing.is_empty(), "{missing:?} aren't among {shown:?}");
    run("promtool", &["check", "rules", rules.to_str().unwrap()]).ok();
    let test = in_repository("tests/integration/monitor/prometheus-rules-test.yml");
    run("promtool", &["test", "rules", test.to_str().unwrap()]).ok();
}
