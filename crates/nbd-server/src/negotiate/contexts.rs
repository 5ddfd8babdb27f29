//! ContextSelection of metadata contexts ("Metadata querying"), and the state that options build up
//! until an export is chosen.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWrite;

use super::stream::stream_replies;
use super::{Negotiated, ReplyMode, or_reply_unknown, push_unknown};
use crate::wire::meta::{MetaRequest, TooManyQueries, encode_meta_context_data};
use crate::wire::option::{Opt, Rep, push_error, push_reply};
use crate::{ContextQueries, Export, Exports};

/// Maximum number of contexts that one client may select. Each is kept for as long as the export is
/// in use, and every block status request reports on each.
const MAX_SELECTED: usize = 64;

/// A metadata context that the client selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectedContext {
    /// Number that identifies the context on the wire.
    pub id: u32,
    /// Index in the export's list of contexts.
    pub position: usize,
}

/// State of the negotiation until an export is chosen. It is created anew for each phase of the
/// negotiation, so none of it can survive STARTTLS.
pub(super) struct NegotiationState<E> {
    pub(super) reply_mode: ReplyMode,
    contexts: Option<ContextSelection<E>>,
}

/// The selected contexts, with the export as it was when they were selected. The export is kept so
/// that the promised contexts remain valid even if it has been replaced since.
pub(super) struct ContextSelection<E> {
    /// The export's name as the client gave it. The selection is discarded if the client chooses
    /// another name.
    name: Vec<u8>,
    pub(super) export: Arc<E>,
    pub(super) contexts: Vec<SelectedContext>,
}

impl<E: Export> NegotiationState<E> {
    pub(super) fn new() -> Self {
        Self { reply_mode: ReplyMode::default(), contexts: None }
    }

    pub(super) fn selection_for(&self, name: &[u8]) -> Option<&ContextSelection<E>> {
        self.contexts.as_ref().filter(|selection| selection.name == name)
    }

    /// Combines the negotiated state with the export that the client chose by `name`.
    pub(super) fn into_negotiated(self, name: &[u8], export: Arc<E>) -> Negotiated<E> {
        let contexts = self.contexts.filter(|selection| selection.name == name);
        let contexts = contexts.map(|selection| selection.contexts).unwrap_or_default();
        Negotiated { export, reply_mode: self.reply_mode, contexts }
    }
}

/// Handles `NBD_OPT_LIST_META_CONTEXT`.
pub(super) async fn reply_list<S: AsyncWrite + Unpin, X: Exports>(
    stream: &mut S,
    out: &mut Vec<u8>,
    data: &[u8],
    exports: &X,
) -> io::Result<()> {
    let option = Opt::LIST_META_CONTEXT;
    let Some((name, queries)) = decode_request(out, option, data, ContextQueries::for_list) else {
        return Ok(());
    };
    // "The metadata context ID in these replies is reserved and SHOULD be … zero"
    let encode = |context: &String| encode_meta_context_data(0, context);
    let each = (option, Rep::META_CONTEXT);
    let produce = |contexts| exports.list_contexts(name, &queries, contexts);
    if stream_replies(stream, out, each, produce, encode).await? {
        push_reply(out, option, Rep::ACK, &[]);
    } else {
        push_unknown(out, option, name);
    }
    Ok(())
}

/// Handles `NBD_OPT_SET_META_CONTEXT`.
pub(super) async fn set<X: Exports>(
    out: &mut Vec<u8>,
    data: &[u8],
    exports: &X,
    state: &mut NegotiationState<X::Export>,
) {
    let option = Opt::SET_META_CONTEXT;
    // "replaces all previously-set metadata contexts (including when this command fails)"
    state.contexts = None;
    // "MUST NOT be requested unless structured replies or extended headers have been
    // negotiated first. If a client attempts to do so, a server SHOULD send
    // NBD_REP_ERR_INVALID"
    if state.reply_mode == ReplyMode::Simple {
        let message = "negotiate structured replies or extended headers first";
        return push_error(out, option, Rep::ERR_INVALID, message);
    }
    let Some((name, queries)) = decode_request(out, option, data, ContextQueries::for_set) else {
        return;
    };
    let export = exports.find_with_contexts(name, &queries).await;
    let Some(export) = or_reply_unknown(out, option, name, export) else { return };
    let selected: Vec<(usize, &str)> = export
        .contexts()
        .into_iter()
        .enumerate()
        .filter(|(_, context)| queries.matches(context))
        .take(MAX_SELECTED + 1)
        .collect();
    // "The request or the reply is too large to process"
    if selected.len() > MAX_SELECTED {
        let message = format!("at most {MAX_SELECTED} metadata contexts can be selected");
        return push_error(out, option, Rep::ERR_TOO_BIG, &message);
    }
    let mut contexts = Vec::new();
    for (id, (position, context)) in (1..).zip(selected) {
        // "each with a unique metadata context ID"
        push_reply(out, option, Rep::META_CONTEXT, &encode_meta_context_data(id, context));
        contexts.push(SelectedContext { id, position });
    }
    push_reply(out, option, Rep::ACK, &[]);
    state.contexts = Some(ContextSelection { name: name.to_vec(), export, contexts });
}

/// Decodes the data of either option into the export's name and the queries. Returns `None` if an
/// error reply was written instead.
fn decode_request<'a>(
    out: &mut Vec<u8>,
    option: Opt,
    data: &'a [u8],
    queries: impl Fn(&[&'a [u8]]) -> Result<ContextQueries<'a>, TooManyQueries>,
) -> Option<(&'a [u8], ContextQueries<'a>)> {
    let request = match MetaRequest::decode(data) {
        Ok(request) => request,
        Err(malformed) => {
            push_error(out, option, Rep::ERR_INVALID, &malformed.to_string());
            return None;
        }
    };
    match queries(&request.queries) {
        Ok(queries) => Some((request.name, queries)),
        // "The request or the reply is too large to process"
        Err(too_many) => {
            push_error(out, option, Rep::ERR_TOO_BIG, &too_many.to_string());
            None
        }
    }
}
