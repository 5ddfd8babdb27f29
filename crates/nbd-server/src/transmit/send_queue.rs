//! Queue of encoded replies.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

use crate::budget::MemoryPermit;
use crate::export::{COPY_THRESHOLD, Segment};

/// Capacity in bytes beyond which an empty buffer is freed.
const MAX_IDLE_CAPACITY: usize = 256 * 1024;

/// Source of zeros to send.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A queue of bytes to send: headers and short data are copied into one buffer, long data is kept
/// as references to blocks. Once grown to what a connection needs, it allocates no more.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    buffer: Vec<u8>,
    /// Number of bytes of `buffer` that have been sent.
    buffer_sent: usize,
    pieces: VecDeque<Piece>,
    length: usize,
    markers: VecDeque<ReplyMarker>,
    /// Total bytes queued and total bytes sent since creation.
    queued: u64,
    sent: u64,
}

#[derive(Debug)]
enum Piece {
    /// Number of bytes in the buffer.
    Buffered(usize),
    /// Referenced data, such as part of a block.
    Data(Bytes),
    /// Number of zeros.
    Zeros(usize),
}

/// Marker in the queue: when all bytes before `position` have been sent, `permit` is released.
#[derive(Debug)]
struct ReplyMarker {
    position: u64,
    permit: Option<MemoryPermit>,
    /// True if this is the end of the reply to a request.
    is_last: bool,
}

impl SendQueue {
    /// Returns the number of bytes that wait to be sent.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Returns true if no bytes wait to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends a copy of `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.grow(bytes.len());
        match self.pieces.back_mut() {
            Some(Piece::Buffered(length)) => *length += bytes.len(),
            _ => self.pieces.push_back(Piece::Buffered(bytes.len())),
        }
    }

    /// Appends part of an export. Long data is referenced, not copied. Short data is copied to
    /// follow its header in the buffer: a slice of its own would cost more, and would keep the
    /// whole block in memory until the client has read it.
    pub(super) fn push_segment(&mut self, segment: Segment) {
        match segment {
            Segment::Data(bytes) if bytes.len() < COPY_THRESHOLD => self.push(&bytes),
            Segment::Data(bytes) => {
                self.grow(bytes.len());
                self.pieces.push_back(Piece::Data(bytes));
            }
            Segment::Zeros(0) => {}
            Segment::Zeros(length) => {
                self.grow(length as usize);
                self.pieces.push_back(Piece::Zeros(length as usize));
            }
        }
    }

    /// Marks the current end of the queue. `permit` is released once everything before it has been
    /// sent. `is_last` says that this is the end of the reply to a request.
    pub(super) fn push_marker(&mut self, permit: Option<MemoryPermit>, is_last: bool) {
        if permit.is_some() || is_last {
            self.markers.push_back(ReplyMarker { position: self.queued, permit, is_last });
        }
    }

    /// Appends another queue, of which nothing may have been sent yet.
    pub(super) fn append(&mut self, other: Self) {
        let before = self.queued;
        let mut buffer = other.buffer.as_slice();
        for piece in other.pieces {
            match piece {
                Piece::Buffered(length) => {
                    let (now, rest) = buffer.split_at_checked(length).unwrap_or((buffer, &[]));
                    self.push(now);
                    buffer = rest;
                }
                Piece::Data(bytes) => self.push_segment(Segment::Data(bytes)),
                piece @ Piece::Zeros(length) => {
                    self.grow(length);
                    self.pieces.push_back(piece);
                }
            }
        }
        let moved = other.markers.into_iter();
        self.markers.extend(moved.map(|r| ReplyMarker { position: before + r.position, ..r }));
    }

    /// Fills `slices` with the bytes to send next, and returns the number of slices used.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut buffer = self.buffer.get(self.buffer_sent..).unwrap_or_default();
        let mut count = 0;
        let mut slots = slices.iter_mut();
        for piece in &self.pieces {
            let mut add = |bytes: &'a [u8]| {
                let slot = slots.next();
                let is_added = slot.is_some();
                if let Some(slot) = slot {
                    *slot = IoSlice::new(bytes);
                    count += 1;
                }
                is_added
            };
            let is_added = match piece {
                Piece::Buffered(length) => {
                    let (now, rest) = buffer.split_at_checked(*length).unwrap_or((buffer, &[]));
                    buffer = rest;
                    add(now)
                }
                Piece::Data(bytes) => add(bytes),
                Piece::Zeros(length) => {
                    let mut left = *length;
                    loop {
                        let now = ZEROS.get(..left).unwrap_or(&ZEROS);
                        left -= now.len();
                        if !add(now) {
                            break false;
                        }
                        if left == 0 {
                            break true;
                        }
                    }
                }
            };
            if !is_added {
                break;
            }
        }
        count
    }

    /// Removes the first `count` bytes, which have been sent. Returns the number of requests whose
    /// replies are thereby complete.
    pub(super) fn advance(&mut self, count: usize) -> usize {
        let mut left = count.min(self.length);
        self.length -= left;
        self.sent += left as u64;
        while left > 0
            && let Some(first) = self.pieces.front_mut()
        {
            let now = match first {
                Piece::Buffered(length) => {
                    let now = left.min(*length);
                    *length -= now;
                    self.buffer_sent += now;
                    now
                }
                Piece::Data(bytes) => {
                    let now = left.min(bytes.len());
                    bytes::Buf::advance(bytes, now);
                    now
                }
                Piece::Zeros(length) => {
                    let now = left.min(*length);
                    *length -= now;
                    now
                }
            };
            left -= now;
            if matches!(first, Piece::Buffered(0) | Piece::Zeros(0))
                || matches!(first, Piece::Data(bytes) if bytes.is_empty())
            {
                self.pieces.pop_front();
            }
        }
        self.reclaim();
        let mut answered = 0;
        while self.markers.front().is_some_and(|next| next.position <= self.sent)
            && let Some(ReplyMarker { permit, is_last, .. }) = self.markers.pop_front()
        {
            answered += usize::from(is_last);
            drop(permit);
        }
        answered
    }

    fn grow(&mut self, length: usize) {
        self.length += length;
        self.queued += length as u64;
    }

    fn reclaim(&mut self) {
        if self.buffer_sent == self.buffer.len() {
            self.buffer.clear();
            self.buffer_sent = 0;
            if self.buffer.capacity() > MAX_IDLE_CAPACITY {
                self.buffer = Vec::new();
            }
        } else if self.buffer_sent > MAX_IDLE_CAPACITY {
            self.buffer.drain(..self.buffer_sent);
            self.buffer_sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(queue: &SendQueue, slots: usize) -> Vec<u8> {
        let mut slices = vec![IoSlice::new(&[]); slots];
        let count = queue.slices(&mut slices);
        slices[..count].iter().map(|slice| &slice[..]).collect::<Vec<_>>().concat()
    }

    fn filled() -> (SendQueue, Vec<u8>) {
        let long = Bytes::from(vec![7; COPY_THRESHOLD + 5]);
        let mut queue = SendQueue::default();
        queue.push(b"head");
        queue.push_segment(Segment::Data(Bytes::from_static(b"short")));
        queue.push_marker(None, true);
        queue.push(b"second");
        queue.push_segment(Segment::Data(long.clone()));
        queue.push_segment(Segment::Zeros(100_000));
        queue.push_marker(None, true);
        let expected = [b"headshortsecond".as_slice(), &long, &vec![0; 100_000]].concat();
        (queue, expected)
    }

    #[test]
    fn bytes_are_sent_in_order_for_any_write_size() {
        for step in [777, COPY_THRESHOLD, 70_000, usize::MAX] {
            for slots in [1, 2, 64] {
                let (mut queue, expected) = filled();
                let (mut out, mut answered) = (Vec::new(), 0);
                while !queue.is_empty() {
                    let mut now = bytes_of(&queue, slots);
                    now.truncate(step);
                    answered += queue.advance(now.len());
                    out.extend(now);
                }
                assert_eq!(out, expected, "{step} {slots}");
                assert_eq!(answered, 2);
                assert!(queue.pieces.is_empty() && queue.buffer.is_empty());
            }
        }
    }

    #[test]
    fn requests_count_as_answered_once_their_last_byte_is_sent() {
        let (mut queue, expected) = filled();
        assert_eq!([queue.advance(8), queue.advance(1), queue.advance(0)], [0, 1, 0]);
        assert_eq!([queue.advance(expected.len() - 10), queue.advance(1)], [0, 1]);
    }

    #[test]
    fn queues_can_be_appended() {
        let (mut queue, mut expected) = filled();
        assert_eq!(queue.advance(20), 1);
        let (other, more) = filled();
        queue.append(other);
        expected.extend(more);
        expected.drain(..20);
        assert_eq!(bytes_of(&queue, 64), expected);
        assert_eq!(queue.len(), expected.len());
        assert_eq!(queue.advance(expected.len()), 3);
    }

    #[test]
    fn short_data_shares_the_buffer_of_its_header() {
        let mut queue = SendQueue::default();
        for _ in 0..10 {
            queue.push(b"head");
            queue.push_segment(Segment::Data(Bytes::from(vec![1; 4096])));
            queue.push_marker(None, true);
        }
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(queue.slices(&mut slices), 1);
    }
}
