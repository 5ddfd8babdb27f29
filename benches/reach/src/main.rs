//! Measures hexz-nbd on archives in an object store, across a network.
//!
//! 1. `material` (of `benches/peers`): an image with a file system, and the same as an archive;
//! 2. `store`: nginx serves both, behind a proxy that adds latency and limits the rate;
//! 3. `process`: the gateway, and nbdkit's curl plugin for comparison, read from there;
//! 4. `load`, `fio` (of `benches/peers`): clients read from those over NBD, without TLS;
//! 5. `cases`: what is measured, and the goals;
//! 6. `table`: the results as Markdown.
//!
//! A gateway that can't read from stores yet is measured on a local file with `--local`, which
//! shows that the benchmark works.

mod cases;
mod options;
mod process;
mod store;
mod table;

// The same image and clients as in the comparison with other servers.
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/client.rs"]
mod client;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/fio.rs"]
mod fio;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/load.rs"]
mod load;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/machine.rs"]
mod machine;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/material.rs"]
mod material;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/measure.rs"]
mod measure;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/reader.rs"]
mod reader;
#[allow(dead_code, reason = "the other benchmark needs more of it")]
#[path = "../../peers/src/servers.rs"]
mod servers;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use cases::Bench;
use measure::progress;
use options::Options;
use table::Table;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        // The table says what couldn't be measured.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hexz-nbd-reach: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns true if everything could be measured.
fn run(options: &Options) -> Result<bool> {
    let bench = Bench::prepare(options)?;
    let mut table = Table::new(machine::describe()?, bench.describe());
    for case in options.cases() {
        progress(&format!("{case:?}"));
        table.add(case, case.run(&bench));
    }
    print!("{}", table.markdown());
    if let Some(file) = &options.output {
        std::fs::write(file, table.markdown())?;
    }
    Ok(table.is_complete())
}
