use super::*;
use nbd_gateway::audit::ReloadFailed;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const TIMEOUT: Duration = Duration::from_secs(20);

fn record(recorder: &Recorder, why: &str) {
    recorder.record(Event::ReloadFailed(ReloadFailed { why: why.into() }));
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let until = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < until, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Checks that sequence numbers are consecutive but for the reported losses. Returns the number of
/// lines and of lost events.
fn count_lines_and_losses(text: &str) -> (u64, u64) {
    assert!(text.ends_with('\n'));
    let (mut next, mut lines, mut lost) = (1, 0, 0);
    for line in text.lines() {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        let missing = json["count"].as_u64().unwrap_or(0);
        assert_eq!(json["seq"].as_u64(), Some(next + missing), "{line}");
        next += missing + 1;
        lost += missing;
        lines += 1;
    }
    (lines, lost)
}

#[test]
fn finish_writes_all_recorded_events() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let recorder = Recorder::start(AuditTarget::open(&path).unwrap()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..500).for_each(|_| record(&recorder, "x")));
        }
    });
    assert_eq!(recorder.finish(TIMEOUT), 0);
    assert_eq!(count_lines_and_losses(&fs::read_to_string(&path).unwrap()), (2000, 0));
    assert_eq!((recorder.written(), recorder.lost()), (2000, 0));
}

fn pipe(path: &Path) -> File {
    mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

/// The reader of a pipe stops, and resumes after many events have been lost.
#[test]
fn stalled_pipe_reader_does_not_block_recording() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    let mut reader = pipe(&path);
    let recorder = Recorder::start(AuditTarget::open(&path).unwrap()).unwrap();
    let long = "x".repeat(1000);
    let mut recorded = 0;
    let begun = Instant::now();
    while recorder.lost() < 100 {
        record(&recorder, &long);
        recorded += 1;
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let mut text = Vec::new();
    let mut read = |all: u64| {
        wait_until(|| {
            let mut chunk = vec![0; 1 << 20];
            if let Ok(read) = reader.read(&mut chunk) {
                text.extend_from_slice(&chunk[..read]);
            }
            recorder.written() >= all
        });
    };
    // All events that were kept, and the line that reports the lost ones.
    read(recorded - 100 + 1);
    record(&recorder, "at last");
    read(recorded - 100 + 2);
    let mut rest = Vec::new();
    if let Err(error) = reader.read_to_end(&mut rest) {
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
    text.extend(rest);
    let text = String::from_utf8(text).unwrap();
    assert_eq!(count_lines_and_losses(&text), (recorded - 100 + 2, 100));
    assert!(text.trim_end().lines().last().unwrap().contains("at last"));
}

#[test]
fn finish_returns_at_the_deadline_if_writing_fails() {
    let recorder = Recorder::start(AuditTarget::open(Path::new("/dev/full")).unwrap()).unwrap();
    (0..3).for_each(|_| record(&recorder, "x"));
    let begun = Instant::now();
    assert_eq!(recorder.finish(Duration::from_millis(300)), 3);
    assert!((300..5000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!((recorder.written(), recorder.lost()), (0, 0));
}

#[test]
fn log_rotation_loses_no_events() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let recorder = Recorder::start(AuditTarget::open(&at("a")).unwrap()).unwrap();
    std::thread::scope(|scope| {
        let recorded = scope.spawn(|| (0..20_000).for_each(|_| record(&recorder, "x")));
        for number in 1..=5 {
            fs::rename(at("a"), at(&format!("a.{number}"))).unwrap();
            recorder.reopen();
            wait_until(|| at("a").exists());
        }
        recorded.join().unwrap();
    });
    assert_eq!(recorder.finish(TIMEOUT), 0);
    let files = ["a.1", "a.2", "a.3", "a.4", "a.5", "a"];
    let text: String = files.iter().map(|name| fs::read_to_string(at(name)).unwrap()).collect();
    assert_eq!(count_lines_and_losses(&text), (20_000, 0));
}
