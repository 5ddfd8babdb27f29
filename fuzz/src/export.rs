//! An export whose every byte is known by its offset. It is made of cells; some are zeros,
//! some have to be waited for, some can't be read, or are handed over wrongly.

use std::future::{Future, ready};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use nbd_server::{Export, Exports, Extent, ListEntry, ReadError, Segment, Span};
use tokio::sync::mpsc::Sender;

/// The metadata contexts that every export has.
pub const CONTEXTS: [&str; 2] = ["base:allocation", "x:y:changed"];

/// A cell's length in bytes; its borders are aligned with nothing.
const CELL: u64 = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    Data,
    Zeros,
    /// The same, not at hand.
    DataLater,
    ZerosLater,
    Unreadable,
    /// Handed over twice, which is the export's fault.
    Twice,
    /// Not handed over at all.
    Missing,
}

impl Cell {
    pub fn is_zeros(self) -> bool {
        matches!(self, Self::Zeros | Self::ZerosLater)
    }

    pub fn is_sound(self) -> bool {
        !matches!(self, Self::Unreadable | Self::Twice | Self::Missing)
    }
}

/// What is at an offset, where it isn't zeros.
pub fn byte_at(offset: u64) -> u8 {
    (offset / 3 % 251) as u8 + 1
}

#[derive(Debug)]
pub struct Pattern {
    name: String,
    size: u64,
    /// What the cells are, again and again.
    layout: Vec<u8>,
}

impl Pattern {
    pub fn new(size: u64, layout: &[u8]) -> Self {
        let layout = if layout.is_empty() { vec![0] } else { layout.to_vec() };
        Self { name: "disk".to_owned(), size, layout }
    }

    fn kind(&self, at: u64) -> u8 {
        self.layout[(at / CELL % self.layout.len() as u64) as usize]
    }

    /// What is at that offset.
    pub fn cell(&self, at: u64) -> Cell {
        match self.kind(at) % 32 {
            0..8 => Cell::Data,
            8..16 => Cell::Zeros,
            16..22 => Cell::DataLater,
            22..29 => Cell::ZerosLater,
            29 => Cell::Unreadable,
            30 => Cell::Twice,
            _ => Cell::Missing,
        }
    }

    /// What the contexts say of that offset.
    pub fn flags(&self, position: usize, at: u64) -> u32 {
        match position {
            0 if self.cell(at).is_zeros() => 3,
            0 => 0,
            _ => u32::from(self.kind(at) >> 7),
        }
    }

    /// The parts of a range that are of one kind, with their kind.
    pub fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Cell)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            let cell = self.cell(start);
            while at < range.end && self.cell(at) == cell {
                // No cell begins beyond 2^63.
                at = range.end.min((at / CELL + 1) * CELL);
            }
            (start < at).then_some((start..at, cell))
        })
    }

    fn segment(&self, range: Range<u64>, cell: Cell) -> Segment {
        if cell.is_zeros() {
            return Segment::Zeros((range.end - range.start) as u32);
        }
        Segment::Data(Bytes::from(range.map(byte_at).collect::<Vec<u8>>()))
    }
}

impl Export for Pattern {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        "made of cells"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
        for (range, cell) in self.parts(span.offset..span.end()) {
            if !matches!(cell, Cell::Data | Cell::Zeros) {
                return false;
            }
            segments.push(self.segment(range, cell));
        }
        true
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        let mut parts: Vec<_> = self.parts(span.offset..span.end()).collect();
        // In some order; which one is as good as any.
        match self.kind(span.offset) % 3 {
            0 => {}
            1 => parts.reverse(),
            _ => parts.sort_by_key(|(range, _)| range.start.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }
        for (range, cell) in parts {
            match cell {
                Cell::Unreadable => return Err(ReadError::Unreadable(range.start)),
                Cell::Missing => continue,
                Cell::Twice => part(range.start, self.segment(range.clone(), cell)),
                Cell::DataLater | Cell::ZerosLater => tokio::task::yield_now().await,
                Cell::Data | Cell::Zeros => {}
            }
            part(range.start, self.segment(range, cell));
        }
        Ok(())
    }

    async fn cache(&self, offset: u64, _: u64) -> Result<(), ReadError> {
        tokio::task::yield_now().await;
        match self.cell(offset) {
            Cell::Unreadable => Err(ReadError::Unreadable(offset)),
            _ => Ok(()),
        }
    }

    fn contexts(&self) -> Vec<&str> {
        CONTEXTS.to_vec()
    }

    async fn extents(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        match self.cell(offset) {
            Cell::Unreadable => return Err(ReadError::Unreadable(offset)),
            Cell::Missing => return Ok(Vec::new()),
            Cell::DataLater => tokio::task::yield_now().await,
            _ => {}
        }
        let (mut at, end) = (offset, offset + length);
        let mut extents: Vec<Extent> = Vec::new();
        // Whoever wants more asks again.
        for _ in 0..2000 {
            let flags = self.flags(position, at);
            let next = end.min((at / CELL + 1) * CELL);
            let is_full = extents.len() == most;
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.length += next - at,
                _ if is_full => break,
                _ => extents.push(Extent { length: next - at, flags }),
            }
            at = next;
            if at == end {
                break;
            }
        }
        Ok(extents)
    }
}

/// Two exports; the first is the default one.
#[derive(Debug)]
pub struct Patterns([Arc<Pattern>; 2]);

impl Patterns {
    pub fn of_size(size: u64) -> Self {
        let disk = Pattern::new(size, &[]);
        let other = Pattern { name: "ändere".to_owned(), ..Pattern::new(size / 2, &[]) };
        Self([Arc::new(disk), Arc::new(other)])
    }

    pub fn all(&self) -> &[Arc<Pattern>] {
        &self.0
    }

    pub fn by_name(&self, name: &[u8]) -> Option<&Arc<Pattern>> {
        match name {
            b"" => self.0.first(),
            name => self.0.iter().find(|export| export.name.as_bytes() == name),
        }
    }
}

impl Exports for Patterns {
    type Export = Pattern;

    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<Pattern>>> + Send {
        ready(self.by_name(name).cloned())
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        for export in &self.0 {
            let (name, description) = (export.name.clone(), export.description().to_owned());
            if listings.send(ListEntry { name, description }).await.is_err() {
                return;
            }
        }
    }
}
