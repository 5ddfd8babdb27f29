//! Detects sequential readers, and decides how far to read ahead of them.

use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

use super::active_streams::ActiveStreams;
use super::plan::CHUNK_SIZE;

const MIB: u64 = 1 << 20;

/// Streams of an object that are followed at the same time.
const MAX_STREAMS: usize = 32;
/// Distance from the end of a stream at which a read still belongs to it. Clients send requests
/// concurrently, so that they arrive out of order.
const REORDERING: u64 = 4 * MIB;
/// Reads without which a stream isn't sequential.
const MIN_READS: u32 = 4;
/// Reads after which a sparse stream starts anew.
const TRIAL_READS: u32 = 16;
/// Length after which the past of a stream counts half.
const MEMORY: u64 = 32 * MIB;
/// Minimum and maximum distance of readahead. Short streams have less: twice of their length, and
/// [`FIRST_WINDOW`] at least.
const MIN_WINDOW: u64 = 2 * MIB;
const FIRST_WINDOW: u64 = 2 * CHUNK_SIZE;
const MAX_WINDOW: u64 = 32 * MIB;
/// Length from which on a stream counts when the memory for readahead is shared.
const COUNTED_LENGTH: u64 = MIB;
/// Maximum size of a request for readahead.
const MAX_REQUEST: u64 = 8 * MIB;
/// Latencies without a wait after which a window shrinks.
const CALM: u32 = 16;
/// Shortest time over which the rate of a stream is measured.
const MIN_INTERVAL: Duration = Duration::from_millis(20);
/// Latency that is assumed before it has been measured.
const ASSUMED_LATENCY: Duration = Duration::from_millis(50);

/// Sequential streams of reads of one object. Pure.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: Vec<Stream>,
}

/// What the distance of readahead depends on besides the stream.
#[derive(Debug)]
pub(crate) struct ReadaheadLimits {
    /// Length of the object.
    pub(crate) length: u64,
    /// Latency of the store, if it is known.
    pub(crate) latency: Option<Duration>,
    /// Bytes to be read ahead by all streams together.
    pub(crate) total: u64,
    /// Length of a stream from which on it is read ahead of.
    pub(crate) min_length: u64,
    /// Minimum and maximum size of a request.
    pub(crate) min_request: u64,
    pub(crate) max_request: u64,
}

/// Where the bytes of a read were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Memory,
    Disk,
    Store,
}

/// Bytes to be fetched before they are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Readahead {
    /// The bytes.
    pub(crate) range: Range<u64>,
    /// True if they may be requested from the store. A reader that finds everything in the caches
    /// causes no requests.
    pub(crate) from_store: bool,
    /// Size of the requests, in bytes.
    pub(crate) request_size: u64,
}

#[derive(Debug)]
struct Stream {
    /// Lowest offset that counts.
    start: u64,
    /// End of the reads so far.
    end: u64,
    /// Bytes read from `start` to `end`.
    read: u64,
    reads: u32,
    /// Up to here everything has been requested.
    ahead: u64,
    window: u64,
    /// True if a read needed the store.
    needs_store: bool,
    /// Time at which a read last had to wait, and the window was doubled.
    waited: Option<Instant>,
    /// Bytes that were read per latency of the store, according to the last measurement.
    progress: u64,
    /// Begin of the present measurement of the rate, and the end of the stream at that time.
    measured: (Instant, u64),
    used: Instant,
    /// Period in which the stream was last counted.
    counted: Option<u64>,
}

impl Streams {
    /// Takes note of a read, and returns what to fetch ahead of it.
    pub(crate) fn on_read(
        &mut self,
        read: &Range<u64>,
        place: Place,
        now: Instant,
        limits: &ReadaheadLimits,
        active: &ActiveStreams,
    ) -> Option<Readahead> {
        let stream = self.stream_of(read, now)?;
        stream.add(read, place, now);
        if !stream.is_sequential() || stream.length() < limits.min_length {
            return None;
        }
        // Short streams, of which archives with references have many, are read ahead of little.
        let share = match stream.length() < COUNTED_LENGTH {
            true => limits.total,
            false => limits.total / active.count(&mut stream.counted, now),
        };
        stream.adjust_window(now, limits.latency.unwrap_or(ASSUMED_LATENCY), place);
        stream.read_ahead(share, limits)
    }

    /// Returns the stream that the read continues, or a new one.
    fn stream_of(&mut self, read: &Range<u64>, now: Instant) -> Option<&mut Stream> {
        let place = (0_usize..)
            .zip(&self.streams)
            .filter(|(_, stream)| stream.includes(read.start))
            .map(|(place, stream)| (stream.end.abs_diff(read.start), place))
            .min();
        let place = match place {
            Some((_, place)) => place,
            None => {
                if self.streams.len() == MAX_STREAMS {
                    let oldest = (0_usize..).zip(&self.streams).min_by_key(|(_, s)| s.used);
                    self.streams.swap_remove(oldest.map_or(0, |(place, _)| place));
                }
                self.streams.push(Stream::new(read.start, now));
                self.streams.len() - 1
            }
        };
        // The most recently used one is the last one.
        let last = self.streams.len() - 1;
        self.streams.swap(place, last);
        self.streams.last_mut()
    }
}

impl Stream {
    fn new(start: u64, now: Instant) -> Self {
        Self {
            start,
            end: start,
            read: 0,
            reads: 0,
            ahead: 0,
            window: MIN_WINDOW,
            needs_store: false,
            waited: None,
            progress: 0,
            measured: (now, start),
            used: now,
            counted: None,
        }
    }

    /// Returns true if a read at this offset belongs to the stream. What has been requested for its
    /// reader does: with many requests in flight, a client may be far ahead with some of them.
    fn includes(&self, offset: u64) -> bool {
        let end = (self.end + REORDERING).max(self.ahead);
        (self.start.saturating_sub(REORDERING)..=end).contains(&offset)
    }

    fn add(&mut self, read: &Range<u64>, place: Place, now: Instant) {
        if self.reads >= TRIAL_READS && !self.is_dense() {
            *self = Self::new(read.start, now);
        }
        self.start = self.start.min(read.start);
        self.end = self.end.max(read.end);
        self.read += read.end - read.start;
        self.reads = self.reads.saturating_add(1);
        self.used = now;
        if place == Place::Store && !self.needs_store {
            self.needs_store = true;
            // What was read ahead so far was only what is on disk.
            self.ahead = 0;
        }
        if self.length() > MEMORY {
            self.start += (self.end - self.start) / 2;
            self.read /= 2;
        }
    }

    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Returns true if most of the bytes that have been passed were read.
    fn is_dense(&self) -> bool {
        self.read >= self.length() / 2
    }

    fn is_sequential(&self) -> bool {
        // Repeated reads of the same bytes are no progress.
        self.reads >= MIN_READS && self.is_dense() && self.length() >= self.read / 2
    }

    /// Derives the window from the rate of the reader: twice of what it reads until a response
    /// arrives. If reads have to wait, it is doubled once per latency, up to twice of that: a reader
    /// that is limited by the window reads faster then, others don't.
    fn adjust_window(&mut self, now: Instant, latency: Duration, place: Place) {
        let since_wait = self.waited.map(|at| now.saturating_duration_since(at));
        if place != Place::Memory && since_wait.is_none_or(|since| since >= latency) {
            let most = (4 * self.progress).clamp(2 * MIN_WINDOW, MAX_WINDOW);
            self.window = self.window.max((self.window * 2).min(most));
            self.waited = Some(now);
        }
        let (since, end) = self.measured;
        let elapsed = now.saturating_duration_since(since);
        if elapsed < latency.max(MIN_INTERVAL) {
            return;
        }
        let progress = u128::from(self.end.saturating_sub(end));
        let progress = progress * latency.as_nanos() / elapsed.as_nanos().max(1);
        self.progress = u64::try_from(progress).unwrap_or(MAX_WINDOW).min(MAX_WINDOW);
        let wanted = 2 * self.progress;
        // It grows at once, and shrinks slowly.
        let is_calm = since_wait.is_none_or(|since| since >= CALM * latency);
        let window = wanted.max(self.window - if is_calm { self.window / 4 } else { 0 });
        self.window = window.clamp(MIN_WINDOW, MAX_WINDOW);
        self.measured = (now, self.end);
    }

    fn read_ahead(&mut self, share: u64, limits: &ReadaheadLimits) -> Option<Readahead> {
        let first = (2 * self.length()).max(FIRST_WINDOW);
        let window = self.window.min(first).min(share) / CHUNK_SIZE * CHUNK_SIZE;
        let request_size = request_size(window, limits)?;
        let target = self.end.saturating_add(window);
        let target = match target < limits.length {
            true => target / request_size * request_size,
            false => limits.length,
        };
        // The chunk with the end of the stream is there or in flight already.
        let start = self.ahead.max(self.end / CHUNK_SIZE * CHUNK_SIZE);
        if start >= target {
            return None;
        }
        self.ahead = target;
        Some(Readahead { range: start..target, from_store: self.needs_store, request_size })
    }
}

/// Returns the size of requests: the larger, the more is read ahead, but several per window. `None`
/// if the window is too small.
fn request_size(window: u64, limits: &ReadaheadLimits) -> Option<u64> {
    if window == 0 {
        return None;
    }
    let mut size = limits.min_request.max(MIB).min(limits.max_request).min(window);
    while size * 2 <= (window / 4).min(MAX_REQUEST).min(limits.max_request) {
        size *= 2;
    }
    Some(size)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "these are lists of ranges")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;

    fn limits() -> ReadaheadLimits {
        ReadaheadLimits {
            length: 1 << 30,
            latency: Some(Duration::from_millis(20)),
            total: 64 * MIB,
            min_length: 0,
            min_request: MIB,
            max_request: 8 * MIB,
        }
    }

    /// A reader of one object.
    struct Reader {
        streams: Streams,
        active: ActiveStreams,
        now: Instant,
    }

    impl Reader {
        fn new() -> Self {
            let active = ActiveStreams::new();
            Self { streams: Streams::default(), active, now: Instant::now() }
        }

        fn read(&mut self, offset: u64, length: u64) -> Option<Readahead> {
            let read = offset..offset + length;
            self.streams.on_read(&read, Place::Memory, self.now, &limits(), &self.active)
        }
    }

    #[test]
    fn the_fourth_sequential_read_is_read_ahead_of_as_far_as_it_has_come() {
        let mut reader = Reader::new();
        for n in 0..3 {
            assert_eq!(reader.read(n * 32 * KIB, 32 * KIB), None);
        }
        let readahead = reader.read(96 * KIB, 32 * KIB);
        let request_size = 512 * KIB;
        let range = 0..512 * KIB;
        assert_eq!(readahead, Some(Readahead { range, from_store: false, request_size }));
        let mut ahead = 512 * KIB;
        for n in 4..64 {
            let end = (n + 1) * 32 * KIB;
            if let Some(Readahead { range, .. }) = reader.read(n * 32 * KIB, 32 * KIB) {
                assert_eq!(range.start, ahead);
                ahead = range.end;
            }
            assert!(ahead >= end && ahead <= end + (2 * end).max(512 * KIB));
        }
        assert_eq!(ahead, 4 * MIB);
    }

    #[test]
    fn a_reader_that_finds_everything_in_the_caches_causes_no_requests() {
        let mut reader = Reader::new();
        let read = |reader: &mut Reader, n: u64, place| {
            let read = n * 256 * KIB..(n + 1) * 256 * KIB;
            reader.streams.on_read(&read, place, reader.now, &limits(), &reader.active)
        };
        for n in 0..16 {
            let place = if n % 2 == 0 { Place::Memory } else { Place::Disk };
            let readahead = read(&mut reader, n, place);
            assert!(readahead.is_none_or(|readahead| !readahead.from_store));
        }
        let readahead = read(&mut reader, 16, Place::Store).unwrap();
        assert!(readahead.from_store && readahead.range.start == 17 * 256 * KIB);
    }

    #[test]
    fn short_streams_are_not_read_ahead_of_if_the_limit_says_so() {
        let mut reader = Reader::new();
        let limits = ReadaheadLimits { min_length: MIB, ..limits() };
        let first = (0..64).find(|n| {
            let read = n * 64 * KIB..(n + 1) * 64 * KIB;
            let (now, active) = (reader.now, &reader.active);
            reader.streams.on_read(&read, Place::Store, now, &limits, active).is_some()
        });
        assert_eq!(first, Some(15));
    }

    #[test]
    fn concurrent_reads_may_arrive_out_of_order() {
        let mut reader = Reader::new();
        let mut ahead = 0;
        for n in 0..64 {
            // Four requests at once, in reverse.
            let place = n / 4 * 4 + 3 - n % 4;
            if let Some(readahead) = reader.read(place * 128 * KIB, 128 * KIB) {
                ahead = readahead.range.end;
            }
        }
        assert_eq!(ahead, 10 * MIB);
        assert_eq!(reader.streams.streams.len(), 1);
    }

    #[test]
    fn reads_of_what_is_read_ahead_belong_to_the_stream() {
        let mut reader = Reader::new();
        for n in 0..32 {
            reader.now += Duration::from_millis(1);
            reader.read(n * MIB, MIB);
        }
        let ahead = reader.streams.streams[0].ahead;
        assert!(ahead > 32 * MIB + REORDERING);
        // Requests that a client sent concurrently, of which the last one arrives first.
        reader.read(ahead - MIB, MIB);
        for n in 32..36 {
            reader.read(n * MIB, MIB);
        }
        assert_eq!(reader.streams.streams.len(), 1);
    }

    #[test]
    fn short_streams_take_nothing_from_the_others() {
        let mut reader = Reader::new();
        for n in 0..16 {
            reader.read(n * MIB, MIB);
        }
        for stream in 1..32 {
            for n in 0..8 {
                reader.read(stream * 32 * MIB + n * 64 * KIB, 64 * KIB);
            }
        }
        let mut long = None;
        assert_eq!(reader.active.count(&mut long, reader.now), 2);
    }

    #[test]
    fn the_window_follows_the_rate_of_the_reader() {
        let mut reader = Reader::new();
        let mut sizes = Vec::new();
        // 1 MiB per millisecond is more than the largest window allows.
        for n in 0..400 {
            reader.now += Duration::from_millis(1);
            if let Some(readahead) = reader.read(n * MIB, MIB) {
                sizes.push(readahead.request_size / MIB);
                assert!(readahead.range.end <= (n + 1) * MIB + MAX_WINDOW);
                assert_eq!(readahead.range.end % MIB, 0);
            }
        }
        sizes.dedup();
        assert_eq!(sizes, [1, 8]);
        // 1 MiB per 10 ms needs little.
        for n in 400..800 {
            reader.now += Duration::from_millis(10);
            reader.read(n * MIB, MIB);
        }
        assert!(reader.streams.streams[0].window <= 5 * MIB);
    }

    #[test]
    fn up_to_32_streams_are_followed_and_share_the_total() {
        let mut reader = Reader::new();
        let mut ahead = 0;
        for n in 0..64 {
            for stream in 0..32 {
                let offset = stream * 32 * MIB + n * 32 * KIB;
                if let Some(readahead) = reader.read(offset, 32 * KIB) {
                    ahead += readahead.range.end - readahead.range.start;
                }
            }
        }
        assert_eq!(reader.streams.streams.len(), 32);
        assert!((32 * 2 * MIB..=32 * 4 * MIB).contains(&ahead), "{}", ahead / MIB);
    }

    #[test]
    fn readahead_ends_with_the_object() {
        let mut reader = Reader::new();
        let start = (1 << 30) - MIB;
        let mut ahead = start;
        for n in 0..32 {
            if let Some(Readahead { range, .. }) = reader.read(start + n * 32 * KIB, 32 * KIB) {
                assert_eq!(range.start, ahead);
                ahead = range.end;
            }
        }
        assert_eq!(ahead, 1 << 30);
    }

    proptest! {
        #[test]
        fn random_reads_are_not_read_ahead_of(
            places in prop::collection::vec(0_u64..(1 << 30) / (32 * KIB), 200),
        ) {
            let mut reader = Reader::new();
            let mut readaheads = 0;
            for place in places {
                reader.now += Duration::from_millis(5);
                readaheads += u32::from(reader.read(place * 32 * KIB, 32 * KIB).is_some());
            }
            prop_assert!(readaheads <= 1);
        }

        /// Whatever is read, nothing is requested twice within a stream, nor beyond the limits.
        #[test]
        fn readahead_stays_within_its_limits(
            steps in prop::collection::vec((0_u64..5, 1_u64..64, 0_u64..40), 300),
        ) {
            let mut reader = Reader::new();
            let (mut offset, mut ahead) = (0, 0);
            for (skip, length, millis) in steps {
                reader.now += Duration::from_millis(millis);
                offset += skip * 4 * KIB;
                let readahead = reader.read(offset, length * 4 * KIB);
                offset += length * 4 * KIB;
                if let Some(Readahead { range, request_size, .. }) = readahead {
                    prop_assert!(range.start >= ahead && range.start < range.end);
                    prop_assert!(range.end <= offset + MAX_WINDOW);
                    prop_assert!((CHUNK_SIZE..=8 * MIB).contains(&request_size));
                    ahead = range.end;
                }
            }
        }
    }
}
