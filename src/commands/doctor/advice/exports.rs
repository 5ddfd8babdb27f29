//! Advice on exports: listing them, opening one, its properties, and reading from it.

use nbd_server::ReplyMode;
use nbd_server::client::ExportInfo;
use nbd_server::wire::info::{BlockSizes, TransmissionFlags};
use nbd_server::wire::option::Rep;
use nbd_server::wire::reply::ErrorCode;
use serde_json::{Value, json};

use super::{Client, FEW, Network, Server};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};
use crate::commands::output::join_first;

/// Maximum number of names that are shown to people: about a screenful.
const MAX_SHOWN: usize = 20;
/// Advice if nothing is known about the reason.
const CHECK_LOG: &str = "check its log";

pub(crate) fn listed(names: &[(String, String)]) -> Step {
    /// Number of exports in the details for programs.
    const MAX_LISTED: usize = 1000;
    const NAME: &str = "exports";
    let all: Vec<Value> = names
        .iter()
        .take(MAX_LISTED)
        .map(|(name, text)| json!({ "name": name, "description": text }))
        .collect();
    let step = match names.len() {
        0 => Step::warning(NAME, "no_exports", "none").advise(
            Server,
            "it serves nothing, or nothing that this client may see; try an export by its name \
             (--export)",
        ),
        count => Step::good(NAME, count.to_string()),
    };
    let mut step = step.detail("count", names.len()).detail("names", all);
    for (name, text) in names.iter().take(MAX_SHOWN) {
        let text =
            if text.is_empty() { String::new() } else { format!(": {}", escape_and_cut(text)) };
        step = step.line(format!("{}{text}", quoted(name)));
    }
    if let Some(more @ 1..) = names.len().checked_sub(MAX_SHOWN) {
        step = step.line(format!("and {more} more"));
    }
    step
}

pub(crate) fn list_failed(failure: &ProbeError) -> Step {
    let found = format!("LIST: {failure}");
    let warning = |reason| Step::warning("exports", reason, &*found);
    let bad = || Step::bad("exports", failure.label(), &*found);
    match failure {
        ProbeError::OptionRefused { reply: Rep::ERR_POLICY | Rep::ERR_UNSUP, .. } => {
            warning("not_listed").advise(
                Server,
                "it doesn't list its exports, so clients need to know their names (nbd-server: \
                 allowlist = true)",
            )
        }
        ProbeError::OptionRefused { .. } => warning(failure.label()),
        ProbeError::ProtocolViolation(_) => {
            bad().advise(Server, "clients can't use this list; check that it is an NBD server")
        }
        _ => bad().advise(Server, CHECK_LOG),
    }
}

/// Builds the step for an export that can't be opened.
pub(crate) fn open_failed(name: &str, failure: &ProbeError, listed: &[(String, String)]) -> Step {
    let step = |reason| {
        let found = format!("can't open {}: {failure}", display_name(name));
        Step::bad("export", reason, found).detail("name", name)
    };
    let names: Vec<String> = listed.iter().map(|(name, _)| quoted(name)).collect();
    match failure {
        ProbeError::OptionRefused { reply: Rep::ERR_UNKNOWN, .. } if names.is_empty() => {
            step("unknown_export").advise(
                Server,
                "it has no export with that name, or none that this client may open; check its \
                 log, or ask its operator",
            )
        }
        ProbeError::OptionRefused { reply: Rep::ERR_UNKNOWN, .. } => step("unknown_export")
            .advise(Client, format!("use a name that is listed: {}", join_first(&names, FEW)))
            .advise(
                Server,
                "or serve it under that name (hexz-nbd: NAME=PATH, --default-export; qemu-nbd: -x; \
                 nbd-server: [NAME]), or allow this client to open it",
            ),
        ProbeError::OptionRefused { reply: Rep::ERR_POLICY, .. } => step("export_not_allowed")
            .advise(
                Server,
                "this client may not open it: check the rules for its address or certificate",
            ),
        ProbeError::OptionRefused { reply: Rep::ERR_TLS_REQD, .. } => step("tls_required")
            .advise(Client, "use TLS for this export: nbds:// instead of nbd://"),
        ProbeError::OptionRefused { reply: Rep::ERR_SHUTDOWN, .. } => step("shutting_down")
            .advise(Server, "it is shutting down: retry after it has restarted"),
        ProbeError::OptionRefused { reply: Rep::ERR_BLOCK_SIZE_REQD, .. } => {
            step("block_size_required")
                .advise(Client, "use a client that requests block sizes, such as libnbd or qemu")
        }
        ProbeError::Closed => step("closed").advise(
            Server,
            "it closed the connection instead of answering: the file behind the export may be \
             missing or unreadable; check its log",
        ),
        _ => step(failure.label()).advise(Server, CHECK_LOG),
    }
}

/// Builds the step for a read that wasn't answered with data.
pub(crate) fn read_failed(name: &'static str, where_: &str, failure: &ProbeError) -> Step {
    let step = |reason| Step::bad(name, reason, format!("{where_}: {failure}"));
    match failure {
        ProbeError::RequestFailed { error: ErrorCode::IO, .. } => {
            step("read_error").detail("error", "NBD_EIO").advise(
                Server,
                "the data behind the export can't be read there: a damaged or truncated file, a \
                 missing parent or backing file, or a disk error; check its log (Hexz archives: \
                 hexz-nbd verify)",
            )
        }
        ProbeError::RequestFailed { error: ErrorCode::PERM, .. } => {
            step("read_not_allowed").advise(Server, "this client may not read: check the rules")
        }
        ProbeError::RequestFailed { error: ErrorCode::INVAL, .. } => step("read_rejected").advise(
            Server,
            "it rejects a read within the size and block sizes that it advertised: a defect of the \
             server",
        ),
        ProbeError::RequestFailed { error: ErrorCode::SHUTDOWN, .. } => step("shutting_down")
            .advise(Server, "it is shutting down: retry after it has restarted"),
        ProbeError::Closed => step("closed").advise(
            Server,
            "it closed the connection during a read: it crashed, was shut down, or dropped this \
             client because of rules or limits; check its log",
        ),
        ProbeError::Timeout => step("timeout")
            .advise(Server, "its storage hangs or is very slow (a network file system?)")
            .advise(Network, "or large packets are lost on the path (MTU, VPN)"),
        ProbeError::ProtocolViolation(_) => step("protocol_violation")
            .advise(Server, "it violates the NBD protocol; try a newer version"),
        _ => step(failure.label()).advise(Server, CHECK_LOG),
    }
}

/// Builds the step that reports the negotiated kind of replies.
pub(crate) fn replies(mode: ReplyMode, failure: Option<&ProbeError>) -> Step {
    let found = match mode {
        ReplyMode::Simple => "simple only",
        ReplyMode::Structured => "structured",
        ReplyMode::Extended => "structured, with extended headers",
    };
    let step = Step::good("replies", found)
        .detail("structured", mode != ReplyMode::Simple)
        .detail("extended", mode == ReplyMode::Extended);
    match failure {
        Some(failure) => step.line(failure.to_string()),
        None => step,
    }
}

/// Builds the step that reports the metadata contexts of the export.
pub(crate) fn contexts(names: Result<&[String], &ProbeError>) -> Step {
    const NAME: &str = "metadata contexts";
    match names {
        Ok(names) => {
            let shown: Vec<String> = names.iter().map(|name| escape_and_cut(name)).collect();
            Step::good(NAME, join_first(&shown, MAX_SHOWN)).detail("names", shown)
        }
        Err(ProbeError::OptionRefused { .. }) => Step::good(NAME, "none"),
        Err(failure) => {
            Step::bad(NAME, failure.label(), failure.to_string()).advise(Server, CHECK_LOG)
        }
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", escape_and_cut(name))
}

fn display_name(name: &str) -> String {
    if name.is_empty() { "the default export".to_owned() } else { quoted(name) }
}

/// Builds the step that reports an export's name, size, flags, description and block sizes.
pub(crate) fn export(name: &str, info: &ExportInfo) -> Step {
    let called = info.name.as_deref().filter(|_| name.is_empty()).unwrap_or(name);
    let flags = flags(info.flags);
    let mut step = Step::good("export", format!("{}, {} bytes", display_name(called), info.size))
        .line(format!("flags: {}", flags.join(", ")))
        .detail("name", name)
        .detail("size", info.size)
        .detail("flags", flags)
        .detail("read_only", info.flags.contains(TransmissionFlags::READ_ONLY));
    if let Some(text) = &info.description {
        step = step
            .line(format!("description: {}", escape_and_cut(text)))
            .detail("description", text.as_str());
    }
    step = check_block_sizes(step, info.block_sizes);
    check_size(step, info.size)
}

fn check_size(step: Step, size: u64) -> Step {
    /// Sector size in which the kernel and most clients address a device, in bytes.
    const SECTOR: u64 = 512;
    if size == 0 {
        return step
            .problem(Outcome::Warning, "empty_export")
            .advise(Server, "the export is empty");
    }
    if i64::try_from(size).is_err() {
        return step.problem(Outcome::Bad, "size_too_large").advise(
            Server,
            "no client accepts a size of 2^63 bytes or more: a defect of the server, or a device \
             that is gone",
        );
    }
    match size % SECTOR {
        0 => step,
        odd => step.problem(Outcome::Warning, "size_not_multiple_of_512").advise(
            Server,
            format!(
                "the size isn't a multiple of 512: the Linux kernel (nbd-client) omits the last \
                 {odd} bytes. Pad the image (truncate --size=%512; nbdkit: \
                 --filter=truncate round-up=512)"
            ),
        ),
    }
}

fn check_block_sizes(step: Step, sizes: Option<BlockSizes>) -> Step {
    let Some(BlockSizes { minimum, preferred, maximum }) = sizes else {
        return step.line("block sizes: not advertised").detail("block_sizes", Value::Null);
    };
    let step = step
        .line(format!("block sizes: minimum {minimum}, preferred {preferred}, maximum {maximum}"))
        .detail(
            "block_sizes",
            json!({ "minimum": minimum, "preferred": preferred, "maximum": maximum }),
        );
    // "The minimum block size … MUST be a power of 2", and so must the preferred one ("Size
    // constraints").
    if !minimum.is_power_of_two()
        || !preferred.is_power_of_two()
        || preferred < minimum
        || maximum < minimum
    {
        return step.problem(Outcome::Bad, "invalid_block_sizes").advise(
            Server,
            "these block sizes violate the NBD specification, and clients rely on them: a defect \
             of the server",
        );
    }
    if minimum > 512 {
        return step.problem(Outcome::Warning, "large_minimum_block_size").advise(
            Client,
            format!(
                "clients that don't request block sizes need: nbd-client -block-size {minimum}"
            ),
        );
    }
    step
}

fn flags(flags: TransmissionFlags) -> Vec<String> {
    const WORDS: [(TransmissionFlags, &str); 12] = [
        (TransmissionFlags::READ_ONLY, "read-only"),
        (TransmissionFlags::SEND_FLUSH, "flush"),
        (TransmissionFlags::SEND_FUA, "FUA"),
        (TransmissionFlags::ROTATIONAL, "rotational"),
        (TransmissionFlags::SEND_TRIM, "trim"),
        (TransmissionFlags::SEND_WRITE_ZEROES, "write zeroes"),
        (TransmissionFlags::SEND_DF, "don't fragment"),
        (TransmissionFlags::CAN_MULTI_CONN, "multiple connections"),
        (TransmissionFlags::SEND_CACHE, "cache"),
        // Only servers that support writes set these two, so the library has no names for them.
        (TransmissionFlags(1 << 9), "resize"),
        (TransmissionFlags(1 << 11), "fast zero"),
        (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block status by context"),
    ];
    let mut words: Vec<String> = Vec::new();
    if !flags.contains(TransmissionFlags::READ_ONLY) {
        words.push("writable".to_owned());
    }
    let known = WORDS.iter().filter(|(flag, _)| flags.contains(*flag));
    words.extend(known.map(|(_, word)| (*word).to_owned()));
    let all = WORDS.iter().fold(TransmissionFlags::HAS_FLAGS, |all, (flag, _)| all.with(*flag));
    let others = flags.without(all);
    if !others.is_empty() {
        words.push(format!("other ({:#x})", others.0));
    }
    words
}
