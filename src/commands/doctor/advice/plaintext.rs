//! Advice on the plaintext phase: the replies to LIST and STARTTLS.

use nbd_server::wire::option::Rep;

use super::{Client, Network, Server};
use crate::cli::server_target::TlsUse;
use crate::commands::doctor::probe_error::ProbeError;
use crate::commands::doctor::report::{Outcome, Step};

/// The server's replies to LIST and STARTTLS on a plaintext connection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlaintextProbe {
    /// Number of exports, or the reason why LIST failed.
    pub(crate) list: Result<usize, ProbeError>,
    /// Reply to STARTTLS; `None` if it wasn't sent.
    pub(crate) starttls: Option<Result<(), ProbeError>>,
}

impl PlaintextProbe {
    /// Returns true if the server requires TLS: it answered LIST with `NBD_REP_ERR_TLS_REQD`.
    pub(crate) fn requires_tls(&self) -> bool {
        matches!(&self.list, Err(failure) if failure.is_refusal(Rep::ERR_TLS_REQD))
    }

    pub(crate) fn offers_tls(&self) -> bool {
        matches!(self.starttls, Some(Ok(())))
    }
}

pub(crate) fn plaintext(observed: &PlaintextProbe, wanted: TlsUse, is_local: bool) -> Step {
    const NAME: &str = "in clear";
    let answers = match &observed.list {
        Ok(_) => "LIST is answered".to_owned(),
        Err(failure) => format!("to LIST {}", failure.describe()),
    };
    let word = match (&observed.starttls, observed.requires_tls()) {
        (_, true) => "required",
        (Some(Ok(())), false) => "offered",
        (Some(Err(_)), false) => "refused",
        (None, false) => "not asked for",
    };
    let base = |step: Step| step.line(answers.clone()).detail("tls", word);
    match (&observed.starttls, observed.requires_tls(), wanted) {
        (_, true, TlsUse::Never) => base(Step::bad(NAME, "the server requires TLS"))
            .advise(Client, "use TLS: nbds:// instead of nbd://, nbd-client -x, qemu's tls-creds"),
        (Some(Ok(())), true, _) => base(Step::good(NAME, "TLS is required")),
        // LIST failed for another reason, so it is unknown whether plaintext clients are served.
        (Some(Ok(())), false, _) if observed.list.is_err() => {
            base(Step::good(NAME, "TLS is offered"))
        }
        (Some(Ok(())), false, _) => {
            let step = base(Step::good(NAME, "TLS is offered, and not required"));
            if is_local {
                return step;
            }
            step.at_least(Outcome::Warning).advise(
                Server,
                "whoever connects without TLS is served in clear; require it (nbdkit \
                 --tls=require, nbd-server force_tls = true)",
            )
        }
        (Some(Err(failure)), is_required, _) => {
            tls_refused(base(Step::good(NAME, "")), failure, is_required, wanted, is_local)
        }
        (None, _, _) => base(Step::good(NAME, "TLS isn't used")),
    }
}

/// Completes the step for a server that didn't acknowledge STARTTLS.
fn tls_refused(
    step: Step,
    failure: &ProbeError,
    is_required: bool,
    wanted: TlsUse,
    is_local: bool,
) -> Step {
    let said = |text: String, step: Step| Step { found: text, ..step };
    let is_clean = matches!(failure, ProbeError::OptionRefused { .. });
    let step = said(format!("TLS isn't offered: to STARTTLS {}", failure.describe()), step);
    if is_required {
        return step.at_least(Outcome::Bad).advise(
            Server,
            "it requires TLS and refuses it: its TLS is not set up, as when certificate or key \
             couldn't be read; its log says why",
        );
    }
    let set_up = "give it a certificate and key (hexz-nbd --tls-cert and --tls-key, nbdkit \
                  --tls=require --tls-certificates, qemu-nbd --tls-creds, nbd-server certfile and \
                  keyfile), or see in its log why it can't use those that it has";
    match wanted {
        TlsUse::Always => step.at_least(Outcome::Bad).advise(Server, set_up).advise(
            Client,
            "or do without TLS (nbd:// instead of nbds://), where nobody can listen on the way",
        ),
        _ if !is_clean => step.at_least(Outcome::Bad).advise(
            Server,
            "a server has to answer STARTTLS, if only with an error: take a newer one",
        ),
        _ if is_local => step,
        _ => step
            .at_least(Outcome::Warning)
            .advise(Server, set_up)
            .advise(Network, "without TLS anybody on the way can read and change everything"),
    }
}
