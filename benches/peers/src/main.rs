//! Measures hexz-nbd and its peers side by side, on one machine and in one run.
//!
//! 1. `material`: an image with a file system, and the same as an archive and as a qcow2;
//! 2. `servers`: the gateway and its peers are started on it, in turn, as often as there
//!    are rounds;
//! 3. `load`, `reader`, `client`: reads are asked of them, and every answer is counted; `fio`: the
//!    same by fio;
//! 4. `cases`: what is measured, a file for each kind, and what is aimed at;
//! 5. `table`, `plot`: what came of it, as Markdown, JSON and SVG.
//!
//! A figure is a median over the rounds and stands beside another one of the same run:
//! figures of two machines, or of two hours, say nothing about each other.

mod bench;
mod cases;
mod client;
mod fio;
mod load;
mod machine;
mod material;
mod measure;
mod options;
mod parts;
mod plot;
mod reader;
mod row;
mod servers;
mod table;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use bench::Bench;
use options::Options;
use table::Report;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        // The table says what couldn't be.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hexz-nbd-peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was to be measured was.
fn run(options: &Options) -> Result<bool> {
    if options.redraw {
        plot::write(&Report::read(&options.output)?, &options.output)?;
        return Ok(true);
    }
    let bench = Bench::prepare(options)?;
    bench.verify()?;
    let mut report = Report::new(machine::describe()?, bench.versions());
    for case in &options.cases() {
        report.add(*case, case.run(&bench));
    }
    if options.keep_others {
        report.keep_others(&options.output)?;
    }
    report.print()?;
    report.write(&options.output)?;
    Ok(report.is_whole())
}
