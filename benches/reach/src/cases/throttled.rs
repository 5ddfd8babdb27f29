//! A store that refuses 30 % of the requests.

use anyhow::{Result, ensure};
use object_server::{Behavior, ObjectServer, Rule, Script};

use super::Bench;
use crate::table::Row;

const PERCENT: u8 = 30;
/// Multiple of the requests that are necessary.
const GOAL: f64 = 1.1;
const PARTS: usize = 4;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let (normal, _) = read(bench, Script::new())?;
    let refused = Rule::new(Behavior::status(503).retry_after(1)).method("GET").percent(PERCENT);
    let (throttled, seconds) = read(bench, Script::new().rule(refused))?;
    let necessary = normal as f64 / (1.0 - f64::from(PERCENT) / 100.0);
    let ratio = throttled as f64 / necessary.max(1.0);
    Ok(vec![
        Row::new(
            format!("{PERCENT} % of requests answered 503, Retry-After 1 s"),
            format!("{throttled} requests"),
        )
        .compared("necessary", format!("{necessary:.0} requests"))
        .goal(format!("<= {GOAL} x"), ratio <= GOAL)
        .note(format!("{ratio:.2} x; {seconds:.1} s")),
    ])
}

/// Reads part of the image, and compares it. Returns the number of requests, and the seconds.
fn read(bench: &Bench, script: Script) -> Result<(usize, f64)> {
    let server = ObjectServer::builder().folder(&bench.material.folder).start()?;
    server.set_script(script);
    let gateway = bench.gateway(&server.url("image.hxz"), &[])?;
    let seconds = bench.compared(PARTS)?.run(&gateway.target())?.seconds;
    let requests = server.log().totals().requests;
    ensure!(requests > 0 || bench.options.local, "the gateway read nothing from the store");
    Ok((requests, seconds))
}
