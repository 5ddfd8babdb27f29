//! Advice on exports: listing them, opening one, its properties, and reading from it.

use nbd_server::ReplyMode;
use nbd_server::client::ExportInfo;
use nbd_server::wire::info::{BlockSizes, TransmissionFlags};
use nbd_server::wire::option::Rep;
use nbd_server::wire::reply::ErrorCode;
use serde_json::{Value, json};

use super::{Client, Network, Server, join_first};
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};

pub(crate) fn listed(names: &[(String, String)]) -> Step {
    /// Number of exports shown to people: about a screenful.
    const MAX_SHOWN_EXPORTS: usize = 20;
    /// Number of exports in the details for programs.
    const MAX_LISTED: usize = 1000;
    const NAME: &str = "exports";
    let all: Vec<Value> = names
        .iter()
        .take(MAX_LISTED)
        .map(|(name, text)| json!({ "name": name, "description": text }))
        .collect();
    let step = match names.len() {
        0 => Step::warning(NAME, "none").advise(
            Server,
            "it serves nothing, or nothing that this client may see; a name that is known can be \
             tried with --export",
        ),
        1 => Step::good(NAME, "1"),
        count => Step::good(NAME, count.to_string()),
    };
    let mut step = step.detail("count", names.len()).detail("names", all);
    for (name, text) in names.iter().take(MAX_SHOWN_EXPORTS) {
        let text =
            if text.is_empty() { String::new() } else { format!(": {}", escape_and_cut(text)) };
        step = step.line(format!("\"{}\"{text}", escape_and_cut(name)));
    }
    if let Some(more @ 1..) = names.len().checked_sub(MAX_SHOWN_EXPORTS) {
        step = step.line(format!("and {more} more"));
    }
    step
}

pub(crate) fn list_failed(failure: &ProbeError) -> Step {
    const NAME: &str = "exports";
    let step = |outcome: Outcome| {
        Step::good(NAME, format!("to LIST {}", failure.describe())).at_least(outcome)
    };
    match failure {
        ProbeError::OptionRefused { reply: Rep::ERR_POLICY | Rep::ERR_UNSUP, .. } => {
            step(Outcome::Warning).advise(
                Server,
                "it doesn't list its exports, so clients have to know their names (nbd-server: \
                 allowlist = true)",
            )
        }
        ProbeError::OptionRefused { .. } => step(Outcome::Warning),
        ProbeError::ProtocolViolation(_) => step(Outcome::Bad)
            .advise(Server, "no client can use such a list; is it really an NBD server?"),
        _ => step(Outcome::Bad).advise(Server, "its log may say why"),
    }
}

/// Builds the step for an export that can't be opened.
pub(crate) fn open_failed(name: &str, failure: &ProbeError, listed: &[(String, String)]) -> Step {
    let called = if name.is_empty() {
        "the default export".to_owned()
    } else {
        format!("\"{}\"", escape_and_cut(name))
    };
    let step = Step::bad("export", format!("{called} can't be opened: {}", failure.describe()))
        .detail("name", name);
    let names: Vec<String> =
        listed.iter().map(|(name, _)| format!("\"{}\"", escape_and_cut(name))).collect();
    match failure {
        ProbeError::OptionRefused { reply: Rep::ERR_UNKNOWN, .. } if names.is_empty() => step.advise(
            Server,
            "there is no export of that name, or none that this client may open; its log or its \
             administrator knows",
        ),
        ProbeError::OptionRefused { reply: Rep::ERR_UNKNOWN, .. } => {
            step.advise(Client, format!("name one that is listed: {}", join_first(&names))).advise(
                Server,
                "or serve it under that name (hexz-nbd: NAME=PATH, --default-export; qemu-nbd: -x; \
                 nbd-server: [NAME]), or let this client open it",
            )
        }
        ProbeError::OptionRefused { reply: Rep::ERR_POLICY, .. } => step.advise(
            Server,
            "this client may not open it: see its rules for this address or certificate",
        ),
        ProbeError::OptionRefused { reply: Rep::ERR_TLS_REQD, .. } => {
            step.advise(Client, "this export takes TLS: nbds:// instead of nbd://")
        }
        ProbeError::OptionRefused { reply: Rep::ERR_SHUTDOWN, .. } => {
            step.advise(Server, "it is about to end; try again when it has been started anew")
        }
        ProbeError::OptionRefused { reply: Rep::ERR_BLOCK_SIZE_REQD, .. } => step.advise(
            Client,
            "this export takes clients that ask for block sizes, as libnbd and qemu do",
        ),
        ProbeError::Closed => step.advise(
            Server,
            "it gave up instead of answering: the file behind the export may be missing or \
             unreadable; its log says why",
        ),
        _ => step.advise(Server, "its log may say why"),
    }
}

/// Builds the step for a read that wasn't answered with data.
pub(crate) fn read_failed(name: &'static str, where_: &str, failure: &ProbeError) -> Step {
    let step = Step::bad(name, format!("{where_}: {}", failure.describe()));
    match failure {
        ProbeError::RequestFailed { error: ErrorCode::IO, .. } => {
            step.detail("error", "NBD_EIO").advise(
                Server,
                "what is behind the export can't be read there: a damaged or truncated file, a \
                 missing parent or backing file, a bad disk. Its log says which (of Hexz archives: \
                 hexz-nbd verify)",
            )
        }
        ProbeError::RequestFailed { error: ErrorCode::PERM, .. } => {
            step.advise(Server, "this client may not read; see its rules")
        }
        ProbeError::RequestFailed { error: ErrorCode::INVAL, .. } => step.advise(
            Server,
            "it refuses a read within the size and block sizes that it gave itself: a fault of the \
             server's",
        ),
        ProbeError::RequestFailed { error: ErrorCode::SHUTDOWN, .. } => {
            step.advise(Server, "it is about to end; try again when it has been started anew")
        }
        ProbeError::Closed => step.advise(
            Server,
            "it gave up in the middle of a read: it may have crashed, or been told to end, or have \
             dropped this client by its rules or limits; its log says which",
        ),
        ProbeError::Timeout => step
            .advise(Server, "its storage hangs or is very slow (a network file system?)")
            .advise(
                Network,
                "or large packets get lost on the way (MTU, VPN), while small ones pass",
            ),
        ProbeError::ProtocolViolation(_) => {
            step.advise(Server, "it breaks the protocol; a newer version may be better")
        }
        _ => step.advise(Server, "its log may say why"),
    }
}

/// Builds the step that reports the negotiated kind of replies.
pub(crate) fn replies(mode: ReplyMode, failure: Option<&ProbeError>) -> Step {
    const NAME: &str = "replies";
    let step = match mode {
        ReplyMode::Simple => Step::good(NAME, "simple ones only"),
        ReplyMode::Structured => Step::good(NAME, "structured"),
        ReplyMode::Extended => Step::good(NAME, "structured, with extended headers"),
    };
    let step = step
        .detail("structured", mode != ReplyMode::Simple)
        .detail("extended", mode == ReplyMode::Extended);
    match failure {
        Some(failure) => step.line(failure.describe()),
        None => step,
    }
}

/// Builds the step that reports the metadata contexts of the export.
pub(crate) fn contexts(names: Result<&[String], &ProbeError>) -> Step {
    const NAME: &str = "metadata contexts";
    /// Number of contexts shown to people.
    const MAX_SHOWN_CONTEXTS: usize = 20;
    match names {
        Ok(names) => {
            let shown_names: Vec<String> = names.iter().map(|name| escape_and_cut(name)).collect();
            let first =
                shown_names.iter().take(MAX_SHOWN_CONTEXTS).map(String::as_str).collect::<Vec<_>>();
            let found = match names.len() {
                0 => "none".to_owned(),
                1..=MAX_SHOWN_CONTEXTS => first.join(", "),
                more => format!("{}, and {} more", first.join(", "), more - MAX_SHOWN_CONTEXTS),
            };
            Step::good(NAME, found).detail("names", shown_names)
        }
        Err(ProbeError::OptionRefused { .. }) => Step::good(NAME, "none"),
        Err(failure) => Step::bad(NAME, failure.describe()).advise(Server, "its log may say why"),
    }
}

/// Builds the step that reports an export's name, size, flags, description and block sizes.
pub(crate) fn export(name: &str, info: &ExportInfo) -> Step {
    let called = info.name.as_deref().filter(|_| name.is_empty()).unwrap_or(name);
    let called = match called {
        "" => "the default export".to_owned(),
        called => format!("\"{}\"", escape_and_cut(called)),
    };
    let flags = flags(info.flags);
    let mut step = Step::good("export", format!("{called}, {} bytes", info.size))
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
        return step.at_least(Outcome::Warning).advise(Server, "the export is empty");
    }
    if i64::try_from(size).is_err() {
        return step.at_least(Outcome::Bad).advise(
            Server,
            "no client takes a size of 2^63 bytes or more: is that a fault, or a device that is \
             gone?",
        );
    }
    match size % SECTOR {
        0 => step,
        odd => step.at_least(Outcome::Warning).advise(
            Server,
            format!(
                "the size is no multiple of 512: the Linux kernel (nbd-client) leaves the last \
                 {odd} bytes out. Pad the image (truncate --size=%512; nbdkit: \
                 --filter=truncate round-up=512)"
            ),
        ),
    }
}

fn check_block_sizes(step: Step, sizes: Option<BlockSizes>) -> Step {
    let Some(BlockSizes { minimum, preferred, maximum }) = sizes else {
        return step.line("block sizes: not told").detail("block_sizes", Value::Null);
    };
    let step = step
        .line(format!("block sizes: {minimum} at least, {preferred} preferred, {maximum} at most"))
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
        return step.at_least(Outcome::Bad).advise(
            Server,
            "these block sizes contradict the NBD specification, and clients go by them: a fault \
             of the server's",
        );
    }
    if minimum > 512 {
        return step.at_least(Outcome::Warning).advise(
            Client,
            format!(
                "clients that don't ask for block sizes need to be told: nbd-client -block-size \
                 {minimum}"
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
        (TransmissionFlags::CAN_MULTI_CONN, "several connections"),
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
        words.push(format!("others ({:#x})", others.0));
    }
    words
}
