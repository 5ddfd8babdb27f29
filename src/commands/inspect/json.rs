//! Renders the findings as JSON. `--help` documents the fields.

use hexz_reader::summary::{
    ArchiveSummary, BlockTotals, PackedFile, SignatureStatus, StreamSummary,
};
use nbd_telemetry::escape;
use serde_json::{Value, json};

pub(super) fn render(facts: &ArchiveSummary, files: Option<&[PackedFile]>) -> Value {
    let parents: Vec<Value> = facts
        .parents
        .iter()
        .map(
            |parent| json!({ "child": parent.child, "name": parent.name, "found": parent.archive }),
        )
        .collect();
    let chain: Vec<Value> = facts
        .chain
        .iter()
        .map(|holder| {
            json!({
                "file": escape::unicode(&*holder.path),
                "depth": holder.depth,
                "blocks": holder.blocks,
                "bytes": holder.bytes,
            })
        })
        .collect();
    let faults: Vec<Value> = facts
        .faults
        .iter()
        .map(|fault| {
            json!({
                "file": escape::unicode(&*fault.path),
                "file_offset": fault.offset,
                "reason": fault.kind.label(),
                "problem": fault.kind.to_string(),
            })
        })
        .collect();
    let remarks: Vec<Value> = facts
        .remarks
        .iter()
        .map(|remark| json!({ "reason": remark.label(), "text": remark.to_string() }))
        .collect();
    let stored = &facts.stored;
    json!({
        "archive": escape::unicode(&*facts.path),
        "file_length": facts.file_length,
        "format": 1,
        "layout": facts.layout.label(),
        "writers": facts.layout.writers(),
        "compression": facts.compression.to_string(),
        "dictionary": facts.dictionary_length,
        "encryption": facts.key_iterations.map(|iterations| json!({ "iterations": iterations })),
        "blocks": {
            "nominal": facts.block_size,
            "vary": facts.has_variable_blocks,
            "chunking": facts.chunking.map(|chunking| json!({
                "average": 1_u64.checked_shl(chunking.average_bits),
                "smallest": chunking.smallest,
                "largest": chunking.largest,
            })),
        },
        "signature": match facts.signature {
            None => "none",
            Some(SignatureStatus::NotVerified) => "unchecked",
            Some(SignatureStatus::Valid) => "valid",
            Some(SignatureStatus::Invalid) => "invalid",
        },
        "manifest": facts.manifest.map(|manifest| json!({
            "length": manifest.length,
            "files": manifest.files,
            "bytes": manifest.bytes,
            "list": files.map(list),
        })),
        "metadata": facts.metadata.as_ref().map(|metadata| json!({
            "length": metadata.length,
            "text": metadata.text,
        })),
        "image": facts.image.map(|image| image.name()),
        "remarks": remarks,
        "index": {
            "pages": facts.main.pages + facts.auxiliary.pages,
            "page_bytes": facts.main.page_bytes + facts.auxiliary.page_bytes,
            "master_index": facts.master_index_length,
        },
        "streams": { "main": stream(&facts.main), "auxiliary": stream(&facts.auxiliary) },
        "stored": {
            "blocks": stored.blocks,
            "bytes": stored.bytes,
            "unshared": stored.undeduplicated_bytes,
            "copies": stored.copies,
            "copy_bytes": stored.copy_bytes,
            "duplicates": stored.duplicates(),
            "saved": stored.saved(),
            "is_estimate": stored.is_estimate,
        },
        "parents": parents,
        "chain": chain,
        "logical_bytes": facts.main.size.saturating_add(facts.auxiliary.size),
        "faults": faults,
        "more_faults": facts.omitted_faults,
    })
}

fn list(files: &[PackedFile]) -> Vec<Value> {
    files.iter().map(|file| json!({ "path": file.path, "size": file.size })).collect()
}

fn stream(stream: &StreamSummary) -> Value {
    let lengths = &stream.lengths;
    let histogram: Vec<Value> = lengths
        .histogram()
        .iter()
        .map(|(up_to, blocks)| json!({ "up_to": up_to, "blocks": blocks }))
        .collect();
    json!({
        "size": stream.size,
        "pages": stream.pages,
        "blocks": lengths.blocks(),
        "lengths": {
            "smallest": lengths.smallest(),
            "median": lengths.median(),
            "mean": lengths.mean(),
            "largest": lengths.largest(),
            "is_rounded": lengths.is_rounded(),
            "histogram": histogram,
        },
        "stored": amount(stream.stored),
        "zeros": amount(stream.zeros),
        "stored_zeros": amount(stream.stored_zeros),
        "in_parents": amount(stream.in_parents),
        "ambiguous": amount(stream.ambiguous),
        "unresolvable": amount(stream.unresolvable),
        "contradictory": amount(stream.contradictory),
        "unknown": amount(stream.unreadable),
    })
}

fn amount(amount: BlockTotals) -> Value {
    json!({ "blocks": amount.blocks, "bytes": amount.bytes })
}
