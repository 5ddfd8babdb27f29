//! Shows the progress of a check: a bar on a terminal, or else a log line at intervals.

use std::io::{IsTerminal, stderr};
use std::path::Path;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use hexz_reader::VerifyProgress;
use indicatif::{ProgressBar, ProgressStyle};
use nbd_telemetry::escape;
use parking_lot::Mutex;
use tracing::Level;

/// Interval between updates.
pub(super) const UPDATE_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between log lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

const BAR_TEMPLATE: &str = "{prefix} [{bar:24}] {percent:>3}% of {binary_total_bytes}, \
                   {binary_bytes_per_sec}, {eta} left{msg}";

/// Progress display for the check of one archive.
pub(super) struct ProgressMeter {
    name: String,
    size: u64,
    kind: Display,
}

enum Display {
    Bar(ProgressBar),
    Lines(Mutex<Instant>),
    Silent,
}

impl ProgressMeter {
    pub(super) fn new(path: &Path, size: u64, is_silent: bool) -> Self {
        let name = escape::path(path).to_string();
        // --quiet hides progress, too.
        let kind = if is_silent || !tracing::enabled!(Level::INFO) {
            Display::Silent
        } else if stderr().is_terminal() {
            let bar = ProgressBar::new(size).with_prefix(name.clone());
            // The template is a constant. If it were invalid, the bar would only look different.
            if let Ok(style) = ProgressStyle::with_template(BAR_TEMPLATE) {
                bar.set_style(style.progress_chars("=> "));
            }
            Display::Bar(bar)
        } else {
            Display::Lines(Mutex::new(Instant::now()))
        };
        Self { name, size, kind }
    }

    pub(super) fn show(&self, progress: &VerifyProgress) {
        let unreadable = match progress.unreadable() {
            0 => String::new(),
            bytes => format!(", {} can't be read", ByteSize::b(bytes).display().iec()),
        };
        match &self.kind {
            Display::Bar(bar) => {
                bar.set_position(progress.bytes());
                bar.set_message(unreadable);
            }
            Display::Lines(last) => {
                let mut last = last.lock();
                if last.elapsed() >= LINE_INTERVAL {
                    *last = Instant::now();
                    let done = ByteSize::b(progress.bytes()).display().iec();
                    let all = ByteSize::b(self.size).display().iec();
                    tracing::info!("{}: checked {done} of {all}{unreadable}", self.name);
                }
            }
            Display::Silent => {}
        }
    }

    /// Hides the bar while `print` runs.
    pub(super) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.kind {
            Display::Bar(bar) => bar.suspend(print),
            Display::Lines(_) | Display::Silent => print(),
        }
    }

    pub(super) fn finish(&self) {
        if let Display::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}
