//! `hexz-nbd verify`: checks archives one after another, and reports what can't be read.

mod meter;
mod report;

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hexz_reader::{OpenOptions, Snapshot, StreamKind, VerifyProgress};
use nbd_telemetry::escape;
use tokio::signal::unix::SignalKind;
use tokio::task::spawn_blocking;

use crate::cli::Verify;
use crate::commands::signals::ExitSignals;
use crate::exit_status::{self, Failure, OutputError};
use crate::hints;
use crate::service::archives;
use meter::ProgressMeter;
use report::Reporter;

/// Time in which blocks that are being decoded may finish after a signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Outcome of checking an archive.
enum CheckOutcome {
    /// Completed check, with the minimum for the exit code.
    Checked(u8),
    /// Check ended by a signal, with the exit code of the program.
    Stopped(u8),
}

/// Checks the named archives, one after another.
pub(crate) fn run(options: &Verify) -> Result<ExitCode, Failure> {
    let mut archives = options.archives.clone();
    let open = archives::options(&options.opening)?;
    let open = archives::with_stores(open, &mut archives, &options.stores)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut signals = ExitSignals::new([SignalKind::interrupt(), SignalKind::terminate()])?;
        let mut code = 0;
        for path in &archives {
            match check(path, &open, options, &mut signals).await? {
                CheckOutcome::Checked(at_least) => code = code.max(at_least),
                CheckOutcome::Stopped(code) => return Ok(code),
            }
        }
        Ok(code)
    });
    // A thread that hangs in a read from a dead file system must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended.map(ExitCode::from)
}

async fn check(
    path: &Path,
    open: &OpenOptions,
    options: &Verify,
    signals: &mut ExitSignals,
) -> Result<CheckOutcome, Failure> {
    let report = Reporter::new(path, options.json);
    let (owned, open) = (path.to_owned(), open.clone());
    let opened = tokio::select! {
        opened = spawn_blocking(move || Snapshot::open(&owned, &open)) => opened,
        code = signals.next() => {
            tracing::warn!("{}: interrupted while it was being opened", escape::path(path));
            return Ok(CheckOutcome::Stopped(code));
        }
    };
    let snapshot = match opened.map_err(io::Error::other)? {
        Ok(snapshot) => snapshot,
        Err(error) => {
            let hint = hints::of_error(&error.kind);
            tracing::error!(reason = error.label(), hint, "{error}");
            report.unopened(&error).map_err(OutputError)?;
            return Ok(CheckOutcome::Checked(exit_status::ARCHIVE));
        }
    };

    let size = snapshot.size(StreamKind::Main).saturating_add(snapshot.size(StreamKind::Auxiliary));
    let meter = Arc::new(ProgressMeter::new(path, size, options.no_progress));
    let progress = Arc::new(VerifyProgress::default());
    let began = Instant::now();
    let mut work = spawn_blocking({
        let (meter, progress, threads) =
            (Arc::clone(&meter), Arc::clone(&progress), options.threads());
        move || {
            let mut printed = Ok(());
            let summary = snapshot.verify(threads, &progress, |fault| {
                let now = meter.suspend(|| report.fault(&fault));
                if now.is_err() {
                    printed = now;
                    progress.stop();
                }
            });
            (summary, report, printed)
        }
    });
    let mut ticks = tokio::time::interval(meter::UPDATE_INTERVAL);
    let stopped = loop {
        tokio::select! {
            done = &mut work => break (Ok(done), None),
            code = signals.next() => {
                progress.stop();
                break (tokio::time::timeout(STOP_TIMEOUT, &mut work).await, Some(code));
            }
            _ = ticks.tick() => meter.show(&progress),
        }
    };
    meter.finish();
    let (done, stopped) = stopped;
    let Ok(done) = done else {
        tracing::warn!("{}: interrupted, but a read hangs", escape::path(path));
        return Ok(CheckOutcome::Stopped(stopped.unwrap_or_default()));
    };
    let (summary, report, printed) = done.map_err(io::Error::other)?;
    printed.map_err(OutputError)?;
    report.summary(&summary, size, began.elapsed()).map_err(OutputError)?;
    let code = if summary.faults > 0 { exit_status::FAILED } else { 0 };
    Ok(stopped.map_or(CheckOutcome::Checked(code), CheckOutcome::Stopped))
}
