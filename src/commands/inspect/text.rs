//! Renders the findings as text for people.

use std::fmt::{self, Write as _};

use bytesize::ByteSize;
use hexz_reader::StreamKind;
use hexz_reader::summary::{
    ArchiveSummary, BlockTotals, ChainMember, LengthHistogram, PackedFile, SignatureStatus,
    StreamSummary,
};
use nbd_telemetry::escape;

use crate::hints;

/// Maximum length of a bar in a histogram, in characters.
const MAX_BAR: usize = 30;
/// Maximum number of parents that are listed. A backing chain may have hundreds of archives.
const MAX_PARENTS: usize = 100;

/// Text of the report. Most lines are a name and a value.
#[derive(Default)]
struct TextReport(String);

impl TextReport {
    fn line(&mut self, name: &str, value: impl fmt::Display) {
        // Writing to a string can't fail.
        let _infallible = writeln!(self.0, "  {name:13} {value}");
    }

    fn bare(&mut self, text: impl fmt::Display) {
        let _infallible = writeln!(self.0, "{text}");
    }
}

pub(super) fn page(facts: &ArchiveSummary, files: &[PackedFile]) -> String {
    let mut page = TextReport::default();
    page.bare(escape::path(&*facts.path));
    archive(&mut page, facts);
    for (kind, stream) in facts.streams() {
        if stream.size > 0 || kind == StreamKind::Main {
            page.bare(format_args!("{kind} stream"));
            stream_lines(&mut page, stream);
        }
    }
    page.bare("stored blocks");
    stored(&mut page, facts);
    if !facts.parents.is_empty() {
        page.bare("parents");
        parents(&mut page, facts);
    }
    for remark in &facts.remarks {
        let hint = hints::of_remark(remark).map(|hint| format!("; {hint}")).unwrap_or_default();
        let (label, remark) = (remark.label(), remark.to_string());
        page.bare(format_args!("NOTE: {}{hint} [{label}]", escape::text(&remark)));
    }
    if let Some(image) = facts.image {
        page.bare(format_args!("NOTE: {image} [{}]", image.name()));
    }
    for fault in &facts.faults {
        let label = fault.kind.label();
        page.bare(format_args!("FAULT: {} [{label}]", escape::text(&hints::with_hint(fault))));
    }
    if facts.omitted_faults > 0 {
        page.bare(format_args!("FAULT: {} more faults", facts.omitted_faults));
    }
    for file in files {
        page.bare(format_args!("{:>15}  {}", file.size, escape::name(&file.path)));
    }
    page.0
}

fn archive(page: &mut TextReport, facts: &ArchiveSummary) {
    page.line("file", format_size(facts.file_length));
    let logical = facts.main.size.saturating_add(facts.auxiliary.size);
    page.line(
        "contents",
        format_args!(
            "{}{}",
            format_size(logical),
            format_ratio(logical, facts.file_length, " the file size")
        ),
    );
    page.line(
        "written by",
        format_args!("{} (layout {})", facts.layout.writers(), facts.layout.label()),
    );
    let dictionary = facts
        .dictionary_length
        .map(|length| format!(", with a dictionary of {}", format_size(length.into())))
        .unwrap_or_default();
    page.line("compression", format_args!("{}{dictionary}", facts.compression));
    let cut = match (facts.chunking, facts.has_variable_blocks) {
        (Some(chunking), _) => format!(
            " nominal, cut by content: {} to {}, average {}",
            format_short_size(chunking.smallest.into()),
            format_short_size(chunking.largest.into()),
            1_u64
                .checked_shl(chunking.average_bits)
                .map_or_else(|| format!("2^{}", chunking.average_bits), format_short_size),
        ),
        (None, true) => " nominal, of variable length".to_owned(),
        (None, false) => ", of fixed length".to_owned(),
    };
    page.line("blocks", format_args!("{}{cut}", format_short_size(facts.block_size.into())));
    page.line(
        "encryption",
        match facts.key_iterations {
            Some(iterations) => {
                format!("AES-256-GCM, key derived with PBKDF2 in {iterations} iterations")
            }
            None => "none".to_owned(),
        },
    );
    page.line(
        "signature",
        match facts.signature {
            None => "none",
            Some(SignatureStatus::NotVerified) => "present; validate it with --verify-key",
            Some(SignatureStatus::Valid) => "valid for a key of --verify-key",
            Some(SignatureStatus::Invalid) => "NOT VALID for any key of --verify-key",
        },
    );
    page.line(
        "index",
        format_args!(
            "{} of {}, master index of {}",
            count(facts.main.pages + facts.auxiliary.pages, "page"),
            format_size(facts.main.page_bytes + facts.auxiliary.page_bytes),
            format_size(facts.master_index_length),
        ),
    );
    if let Some(manifest) = facts.manifest {
        page.line(
            "directory",
            format_args!(
                "{} of {}; manifest of {}",
                count(manifest.files, "file"),
                format_size(manifest.bytes),
                format_size(manifest.length.into()),
            ),
        );
    }
    if let Some(metadata) = &facts.metadata {
        let shown_length = metadata.text.len() as u64;
        let more = if u64::from(metadata.length) > shown_length { " …" } else { "" };
        let length = format_size(metadata.length.into());
        page.line("metadata", format_args!("{length}: {}{more}", escape::name(&metadata.text)));
    }
}

fn stream_lines(page: &mut TextReport, stream: &StreamSummary) {
    page.line("size", format_size(stream.size));
    let of = |part: BlockTotals| {
        format!(
            "{}, {}{}",
            count(part.blocks, "block"),
            format_size(part.bytes),
            format_percentage(part.bytes, stream.size)
        )
    };
    page.line("stored here", of(stream.stored));
    let kept = match stream.stored_zeros.blocks {
        0 => String::new(),
        blocks => format!("; {} stored anyway", count(blocks, "block")),
    };
    page.line("zeros", format_args!("{}{kept}", of(stream.zeros)));
    page.line("in parents", of(stream.in_parents));
    for (name, part) in [
        ("ambiguous", stream.ambiguous),
        ("NOT FOUND", stream.unresolvable),
        ("CONTRADICTORY", stream.contradictory),
        ("UNKNOWN", stream.unreadable),
    ] {
        if part != BlockTotals::default() {
            page.line(name, of(part));
        }
    }
    lengths(page, &stream.lengths);
}

fn lengths(page: &mut TextReport, lengths: &LengthHistogram) {
    let (Some(smallest), Some(median), Some(mean), Some(largest)) =
        (lengths.smallest(), lengths.median(), lengths.mean(), lengths.largest())
    else {
        return;
    };
    let rounded = if lengths.is_rounded() { " (rounded by up to 0.4 %)" } else { "" };
    page.line(
        "block sizes",
        format_args!(
            "{}, from {smallest} to {largest} bytes, median {median}, mean {mean}{rounded}",
            count(lengths.blocks(), "block"),
        ),
    );
    let steps = lengths.histogram();
    let most = steps.iter().map(|(_, blocks)| *blocks).max().unwrap_or(1).max(1);
    for (up_to, blocks) in steps {
        let length = u128::from(blocks) * MAX_BAR as u128 / u128::from(most);
        let bar = "#".repeat(usize::try_from(length).unwrap_or(MAX_BAR));
        let bar = if bar.is_empty() && blocks > 0 { "." } else { &bar };
        page.line(
            "",
            format_args!("up to {:>8}  {bar:MAX_BAR$} {blocks}", format_short_size(up_to.into())),
        );
    }
}

fn stored(page: &mut TextReport, facts: &ArchiveSummary) {
    let stored = &facts.stored;
    let about = if stored.is_estimate { "about " } else { "" };
    let error = if stored.is_estimate { " (estimated within 0.3 %)" } else { "" };
    page.line("compressed", {
        let ratio = format_ratio(stored.bytes, stored.undeduplicated_bytes, "");
        format!(
            "{} to {}{ratio}",
            format_size(stored.bytes),
            format_size(stored.undeduplicated_bytes)
        )
    });
    page.line(
        "copies",
        format_args!(
            "{about}{} of {} for {}{error}",
            stored.copies,
            format_size(stored.copy_bytes),
            count(stored.blocks, "block")
        ),
    );
    page.line(
        "duplicates",
        format_args!(
            "{about}{} with the copy of another block, saving {}",
            count(stored.duplicates(), "block"),
            format_size(stored.saved()),
        ),
    );
}

fn parents(page: &mut TextReport, facts: &ArchiveSummary) {
    for parent in facts.parents.iter().take(MAX_PARENTS) {
        let child = facts.chain.get(parent.child).map(|holder| holder.depth).unwrap_or_default();
        let found = match parent.archive.and_then(|place| facts.chain.get(place)) {
            Some(holder) => format!("found at {}", escape::path(&*holder.path)),
            None => "NOT FOUND or not usable".to_owned(),
        };
        page.line(
            &generation(child + 1),
            format_args!("{:?}, {found}", escape::name(&parent.name)),
        );
    }
    if let Some(more @ 1..) = facts.parents.len().checked_sub(MAX_PARENTS) {
        page.line("", format_args!("and {more} more"));
    }
    page.bare("blocks by archive, without zeros");
    for holder in facts.chain.iter().take(MAX_PARENTS) {
        let ChainMember { depth, blocks, bytes, path } = holder;
        let path = escape::path(&**path);
        page.line(
            &generation(*depth),
            format_args!("{}, {}, in {path}", count(*blocks, "block"), format_size(*bytes)),
        );
    }
}

fn generation(depth: u32) -> String {
    match depth {
        0 => "here".to_owned(),
        1 => "parent".to_owned(),
        2 => "grandparent".to_owned(),
        more => format!("parent {more}"),
    }
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Formats a size in bytes, and from 10,000 bytes on in a larger unit, too.
fn format_size(bytes: u64) -> String {
    if bytes < 10_000 {
        format!("{bytes} bytes")
    } else {
        format!("{bytes} bytes ({})", format_short_size(bytes))
    }
}

fn format_short_size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn format_percentage(part: u64, whole: u64) -> String {
    if whole == 0 {
        String::new()
    } else {
        format!(", {:.1} %", 100.0 * part as f64 / whole as f64)
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people, who don't read so many digits")]
fn format_ratio(large: u64, small: u64, of: &str) -> String {
    if small == 0 {
        String::new()
    } else {
        format!(", {:.2} times{of}", large as f64 / small as f64)
    }
}
