//! What is agreed on about metadata contexts ("Metadata querying"), and what of it an
//! export's choice leaves.

use std::sync::Arc;

use super::{Chosen, ReplyMode, found};
use crate::nbd::wire::meta::{self, MetaRequest, meta_context_data};
use crate::nbd::wire::option::{Opt, Rep, push_error, push_reply};
use crate::nbd::{Export, Exports};

/// A metadata context that the client selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectedContext {
    /// What stands for it on the wire.
    pub id: u32,
    /// Its position among the export's contexts.
    pub position: usize,
}

/// What has been agreed on before an export is chosen. It lives as long as one leg of the
/// negotiation, so none of it can survive STARTTLS.
pub(super) struct Agreed<E> {
    pub(super) replies: ReplyMode,
    contexts: Option<Selection<E>>,
}

/// Contexts that were selected, of the export as it was then: it is kept, so that what was
/// promised holds though the export may have been replaced by another one since.
pub(super) struct Selection<E> {
    /// The export's name as the client gave it. Contexts are forgotten when it chooses
    /// another name.
    name: Vec<u8>,
    pub(super) export: Arc<E>,
    pub(super) contexts: Vec<SelectedContext>,
}

impl<E: Export> Agreed<E> {
    pub(super) fn new() -> Self {
        Self { replies: ReplyMode::default(), contexts: None }
    }

    pub(super) fn selection_for(&self, name: &[u8]) -> Option<&Selection<E>> {
        self.contexts.as_ref().filter(|selection| selection.name == name)
    }

    /// What the client chose by that name.
    pub(super) fn choose(self, name: &[u8], export: Arc<E>) -> Chosen<E> {
        let contexts = self.contexts.filter(|selection| selection.name == name);
        let contexts = contexts.map(|selection| selection.contexts).unwrap_or_default();
        Chosen { export, replies: self.replies, contexts }
    }
}

/// Answers `NBD_OPT_LIST_META_CONTEXT`.
pub(super) async fn list<X: Exports>(out: &mut Vec<u8>, data: &[u8], exports: &X) {
    let option = Opt::LIST_META_CONTEXT;
    let Some((request, export)) = asked(out, option, data, exports).await else { return };
    for name in export.contexts() {
        // "If zero queries are sent, then the server MUST return all the metadata contexts"
        let wanted = request.queries.is_empty()
            || request.queries.iter().any(|query| meta::lists(query, name));
        if wanted {
            // "The metadata context ID in these replies is reserved and SHOULD be … zero"
            push_reply(out, option, Rep::META_CONTEXT, &meta_context_data(0, name));
        }
    }
    push_reply(out, option, Rep::ACK, &[]);
}

/// Answers `NBD_OPT_SET_META_CONTEXT`.
pub(super) async fn set<X: Exports>(
    out: &mut Vec<u8>,
    data: &[u8],
    exports: &X,
    agreed: &mut Agreed<X::Export>,
) {
    let option = Opt::SET_META_CONTEXT;
    // "replaces all previously-set metadata contexts (including when this command fails)"
    agreed.contexts = None;
    // "MUST NOT be requested unless structured replies or extended headers have been
    // negotiated first. If a client attempts to do so, a server SHOULD send
    // NBD_REP_ERR_INVALID"
    if agreed.replies == ReplyMode::Simple {
        let message = "ask for structured replies or extended headers first";
        return push_error(out, option, Rep::ERR_INVALID, message);
    }
    let Some((request, export)) = asked(out, option, data, exports).await else { return };
    let mut contexts = Vec::new();
    for (position, name) in export.contexts().into_iter().enumerate() {
        if request.queries.iter().any(|query| meta::selects(query, name)) {
            // "each with a unique metadata context ID"
            let id = u32::try_from(contexts.len() + 1).unwrap_or(u32::MAX);
            push_reply(out, option, Rep::META_CONTEXT, &meta_context_data(id, name));
            contexts.push(SelectedContext { id, position });
        }
    }
    push_reply(out, option, Rep::ACK, &[]);
    agreed.contexts = Some(Selection { name: request.name.to_vec(), export, contexts });
}

/// What either option asks, and of which export; `None` if the answer was an error.
async fn asked<'a, X: Exports>(
    out: &mut Vec<u8>,
    option: Opt,
    data: &'a [u8],
    exports: &X,
) -> Option<(MetaRequest<'a>, Arc<X::Export>)> {
    match MetaRequest::decode(data) {
        Ok(request) => {
            let export = exports.find_with_contexts(request.name).await;
            let export = found(out, option, request.name, export)?;
            Some((request, export))
        }
        Err(malformed) => {
            push_error(out, option, Rep::ERR_INVALID, &malformed.to_string());
            None
        }
    }
}
