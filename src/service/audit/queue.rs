//! Queue of lines to be written, and the batch being written. No locks and no I/O: those are in
//! `recorder.rs`.

use super::line::EventLine;
use nbd_gateway::audit::Event;

/// Maximum size of the lines that wait or are being written, in bytes: some 10,000 events. A disk
/// that hangs for a while loses nothing of an ordinary day, and a flood can't take more memory than
/// this.
pub(super) const MAX_QUEUED: usize = 4 * 1024 * 1024;

/// Maximum length of a line that reports lost events, in bytes.
const MAX_LOSS_LINE: usize = 192;

/// Room reserved for the last event, in bytes: the longest that an event can be. The end of a run
/// is recorded even after a flood.
const LAST_EVENT_RESERVE: usize = 8 * 1024;

/// Buffer capacity kept while there is nothing to write, in bytes.
const KEPT_CAPACITY: usize = 256 * 1024;

/// Queue of lines, ordered by sequence number.
#[derive(Debug)]
pub(super) struct LineQueue {
    run: String,
    next_seq: u64,
    lines: Vec<u8>,
    /// Number of lines queued so far.
    line_count: u64,
    /// Bytes that the writer has taken but not yet written.
    bytes_with_writer: usize,
    /// Number of lost events that no line reports yet.
    unreported_losses: u64,
}

impl LineQueue {
    /// Creates an empty queue for the run of that name.
    pub(super) fn new(run: String) -> Self {
        Self {
            run,
            next_seq: 1,
            lines: Vec::new(),
            line_count: 0,
            bytes_with_writer: 0,
            unreported_losses: 0,
        }
    }

    /// Appends a line. Returns false if there is no room: the event is lost, and a line reports
    /// that as soon as there is room.
    pub(super) fn push(&mut self, line: &EventLine) -> bool {
        self.push_with_reserve(LAST_EVENT_RESERVE, line)
    }

    /// Appends the last line, which may use the room reserved for it.
    pub(super) fn push_last(&mut self, line: &EventLine) -> bool {
        self.push_with_reserve(0, line)
    }

    fn push_with_reserve(&mut self, free: usize, line: &EventLine) -> bool {
        // There is always room left for the lines that report lost events.
        let needed = line.max_length(&self.run) + 2 * MAX_LOSS_LINE + free;
        let fits = self.lines.len() + self.bytes_with_writer + needed <= MAX_QUEUED;
        if fits {
            self.append_loss_report();
            self.append(line);
        } else {
            self.count_lost(1);
        }
        fits
    }

    /// Counts events as lost, including those that can't be serialized.
    pub(super) fn count_lost(&mut self, count: u64) {
        self.unreported_losses += count;
        self.next_seq += count;
    }

    fn append(&mut self, line: &EventLine) {
        self.lines.extend_from_slice(&line.to_bytes(self.next_seq, &self.run));
        self.next_seq += 1;
        self.line_count += 1;
    }

    fn append_loss_report(&mut self) {
        if self.unreported_losses > 0
            && let Ok(line) = EventLine::new(&Event::Lost { count: self.unreported_losses })
        {
            self.append(&line);
            self.unreported_losses = 0;
        }
    }

    /// Returns the number of lines queued so far, including those that report lost events.
    pub(super) fn line_count(&self) -> u64 {
        self.line_count
    }

    /// Returns true if there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.unreported_losses == 0
    }

    /// Hands all lines to the writer, which has written the previous batch. Reuses the buffer
    /// `emptied`.
    pub(super) fn take_batch(&mut self, mut emptied: Vec<u8>) -> LineBatch {
        self.bytes_with_writer = 0;
        self.append_loss_report();
        emptied.clear();
        emptied.shrink_to(KEPT_CAPACITY);
        let bytes = std::mem::replace(&mut self.lines, emptied);
        self.bytes_with_writer = bytes.len();
        LineBatch { bytes, written: 0 }
    }
}

/// Lines that are being written.
#[derive(Debug, Default)]
pub(super) struct LineBatch {
    bytes: Vec<u8>,
    written: usize,
}

impl LineBatch {
    /// Returns the bytes that are still to be written.
    pub(super) fn rest(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    /// Returns true if everything has been written.
    pub(super) fn is_done(&self) -> bool {
        self.rest().is_empty()
    }

    /// Records that `bytes` more bytes were written; returns the number of lines that this
    /// completed.
    pub(super) fn advance(&mut self, bytes: usize) -> u64 {
        let done = self.rest().get(..bytes).unwrap_or(self.rest());
        let lines = count_newlines(done);
        self.written += done.len();
        lines
    }

    /// Returns to the start of the line that has been written in part.
    pub(super) fn rewind_to_line_start(&mut self) {
        let done = self.bytes.get(..self.written).unwrap_or_default();
        self.written = done.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    }

    /// Returns true if the next byte starts a line.
    pub(super) fn is_at_line_start(&self) -> bool {
        let done = self.bytes.get(..self.written).unwrap_or_default();
        done.last().is_none_or(|&byte| byte == b'\n')
    }

    /// Returns the buffer, for reuse.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

fn count_newlines(bytes: &[u8]) -> u64 {
    bytes.iter().map(|&byte| u64::from(byte == b'\n')).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_gateway::audit::ReloadFailed;

    fn line(length: usize) -> EventLine {
        EventLine::new(&Event::ReloadFailed(ReloadFailed { why: "x".repeat(length).into() }))
            .unwrap()
    }

    fn read(bytes: &[u8]) -> Vec<(u64, Option<u64>)> {
        str::from_utf8(bytes)
            .unwrap()
            .lines()
            .map(|line| {
                let json: serde_json::Value = serde_json::from_str(line).unwrap();
                (json["seq"].as_u64().unwrap(), json["count"].as_u64())
            })
            .collect()
    }

    #[test]
    fn lost_events_are_reported_where_they_are_missing() {
        let mut queue = LineQueue::new("r".into());
        let mut pushed = 0;
        while queue.push(&line(1000)) {
            pushed += 1;
        }
        assert!(pushed > MAX_QUEUED / 1300 && queue.lines.len() <= MAX_QUEUED);
        assert!(!queue.push(&line(1000)));
        let first = queue.take_batch(Vec::new());
        // The batch still holds the memory; even a short line has to wait behind the report of the
        // loss.
        assert!(!queue.push(&line(1000)));
        let seqs = read(&first.bytes);
        assert_eq!(seqs.len(), pushed + 1);
        assert_eq!(seqs.last(), Some(&(pushed as u64 + 3, Some(2))));
        // The first batch is written, so there is room again.
        let second = queue.take_batch(first.into_bytes());
        assert_eq!(read(&second.bytes), [(pushed as u64 + 5, Some(1))]);
        assert!(queue.push(&line(1)) && !queue.is_empty());
        assert_eq!(read(&queue.take_batch(second.into_bytes()).bytes), [(pushed as u64 + 6, None)]);
        assert!(queue.is_empty() && queue.lines.capacity() <= KEPT_CAPACITY);
    }

    #[test]
    fn the_last_event_always_has_room() {
        let why = "\u{1}".repeat(nbd_gateway::audit::MAX_TEXT).into();
        let longest = EventLine::new(&Event::ReloadFailed(ReloadFailed { why })).unwrap();
        let mut queue = LineQueue::new("r".into());
        while queue.push(&line(1)) {}
        assert!(!queue.push(&line(1)) && queue.push_last(&longest));
        let seqs = read(&queue.take_batch(Vec::new()).bytes);
        assert_eq!(seqs.get(seqs.len() - 2).map(|(_, count)| *count), Some(Some(2)));
    }

    #[test]
    fn interrupted_lines_are_rewritten_from_their_start() {
        let mut batch = LineBatch { bytes: b"one\ntwo\nthree\n".to_vec(), written: 0 };
        assert_eq!((batch.advance(2), batch.is_at_line_start()), (0, false));
        batch.rewind_to_line_start();
        assert_eq!(batch.rest(), b"one\ntwo\nthree\n");
        assert_eq!((batch.advance(5), batch.rest()), (1, &b"wo\nthree\n"[..]));
        batch.rewind_to_line_start();
        assert_eq!(batch.rest(), b"two\nthree\n");
        assert_eq!(batch.advance(4), 1);
        batch.rewind_to_line_start();
        assert_eq!((batch.rest(), batch.is_done()), (&b"three\n"[..], false));
        assert_eq!((batch.advance(99), batch.is_done()), (1, true));
    }
}
