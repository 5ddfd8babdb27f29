//! Implements `hexz-nbd trace`: records, merges and describes traces.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use hexz_exports::{MAX_TRACE_LENGTH, Trace, TraceError};
use hexz_reader::storage::is_url;
use http_body_util::BodyExt;
use hyper::Uri;
use nbd_telemetry::escape;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::signal::unix::SignalKind;

use super::monitor_client::{MonitorClient, MonitorResponse, Problem};
use super::signals::ExitSignals;
use crate::cli::{self, TraceCommand, TraceMerge, TraceRecord};
use crate::commands::output;
use crate::exit_status::{Failure, fixed_exit_status};

/// Time to connect to the monitor.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Reason for which there is no trace.
#[derive(Debug, thiserror::Error)]
enum TraceFailure {
    #[error("can't read {}: {error}", escape::path(.path))]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: {error}", escape::path(.path))]
    Invalid { path: PathBuf, error: TraceError },
    #[error("{} is a URL: this reads files, so copy the trace out of the store", escape::path(.0))]
    Url(PathBuf),
    #[error("can't merge the traces: {0}")]
    Merge(TraceError),
    #[error("nothing was read of the export {0:?}: check the name, and that clients use it")]
    Empty(String),
}

fixed_exit_status! { TraceFailure => FAILED, "trace_unusable"; }

/// Runs the subcommand.
pub(crate) fn run(options: &cli::Trace) -> Result<ExitCode, Failure> {
    match &options.command {
        TraceCommand::Record(options) => record(options),
        TraceCommand::Merge(options) => {
            output::print(merge(options)?.to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        TraceCommand::Show(options) => {
            for path in &options.files {
                output::print(describe(path, &read(path)?))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn record(options: &TraceRecord) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(print_recording(options));
    // A pending name lookup must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

/// Prints a trace while it is recorded. An interruption is its normal end.
async fn print_recording(options: &TraceRecord) -> Result<ExitCode, Failure> {
    let mut signals = ExitSignals::new([SignalKind::interrupt(), SignalKind::terminate()])?;
    let client = MonitorClient::new(&options.monitor, &options.access)?;
    let failed = |problem: Problem| client.error(problem);
    let mut recording = start(&client, &options.export).await.map_err(failed)?;
    tracing::info!(export = options.export, "recording; Ctrl-C ends it");
    let mut has_reads = false;
    let mut end = None;
    loop {
        let past_end = async {
            match end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        let frame = tokio::select! {
            frame = recording.body.frame() => frame,
            _ = signals.next() => break,
            () = past_end => break,
        };
        let Some(frame) = frame else { break };
        let cut_off = |error| ("truncated", format!("the recording was cut off: {error}"));
        let frame = frame.map_err(|error| failed(cut_off(error)))?;
        if let Some(lines) = frame.data_ref() {
            output::print(lines)?;
            has_reads = true;
            let begun = tokio::time::Instant::now();
            end = end.or_else(|| Some(begun + options.duration?));
        }
    }
    if has_reads {
        Ok(ExitCode::SUCCESS)
    } else {
        Err(TraceFailure::Empty(options.export.clone()).into())
    }
}

async fn start(client: &MonitorClient, export: &str) -> Result<MonitorResponse, Problem> {
    let name = utf8_percent_encode(export, NON_ALPHANUMERIC);
    let path: Uri = format!("/trace?export={name}")
        .parse()
        .map_err(|_| ("usage", "the name of the export is too long".to_owned()))?;
    let response = client.get(path, "text/plain");
    let no_response = format!("no response within {} s", CONNECT_TIMEOUT.as_secs());
    let response = tokio::time::timeout(CONNECT_TIMEOUT, response).await;
    response.unwrap_or(Err(("timeout", no_response)))
}

fn merge(options: &TraceMerge) -> Result<Trace, Failure> {
    let traces: Vec<Trace> =
        options.files.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    let least = options.at_least.unwrap_or(traces.len() / 2 + 1);
    Ok(Trace::merge(&traces, least).map_err(TraceFailure::Merge)?)
}

fn read(path: &Path) -> Result<Trace, TraceFailure> {
    if is_url(path) {
        return Err(TraceFailure::Url(path.to_owned()));
    }
    let io = |error| TraceFailure::Io { path: path.to_owned(), error };
    let length = fs::metadata(path).map_err(io)?.len();
    if length > MAX_TRACE_LENGTH {
        return Err(TraceFailure::Invalid { path: path.to_owned(), error: TraceError::TooLong });
    }
    let text = fs::read_to_string(path).map_err(io)?;
    text.parse().map_err(|error| TraceFailure::Invalid { path: path.to_owned(), error })
}

/// Describes a trace in a few lines.
fn describe(path: &Path, trace: &Trace) -> String {
    let size = |bytes| ByteSize(bytes).display().iec().to_string();
    let source = &trace.source;
    let duration = trace.ranges.iter().map(|range| range.at).max().unwrap_or_default();
    let mut text = format!("{}\n", escape::path(path));
    let mut line = |label: &str, value: &dyn std::fmt::Display| {
        // Writing to a string can't fail.
        writeln!(text, "  {label:9} {value}").unwrap_or_default();
    };
    let stream = format_args!("{} stream, {}", source.stream, size(source.size)).to_string();
    line("export", &format_args!("{} ({stream})", escape::name(&source.export)));
    line("ranges", &trace.ranges.len());
    line("bytes", &size(trace.bytes()));
    line("duration", &format_args!("{:.1} s", duration.as_secs_f64()));
    text
}
