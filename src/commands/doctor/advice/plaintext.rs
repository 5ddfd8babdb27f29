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
    let is_required = observed.requires_tls();
    let answer = match &observed.list {
        Ok(_) => "LIST: answered".to_owned(),
        Err(failure) => format!("LIST: {failure}"),
    };
    let tls = match (&observed.starttls, is_required) {
        (_, true) => "required",
        (Some(Ok(())), false) => "offered",
        (Some(Err(_)), false) => "refused",
        (None, false) => "not asked for",
    };
    let step = |found: &str| Step::good("in clear", found).line(answer.clone()).detail("tls", tls);
    match &observed.starttls {
        None if is_required => step("the server requires TLS")
            .problem(Outcome::Bad, "tls_required")
            .advise(Client, "use TLS: nbds:// instead of nbd://, nbd-client -x, qemu's tls-creds"),
        None => step("TLS isn't used"),
        Some(Ok(())) if is_required => step("TLS is required"),
        // LIST failed for another reason, so it is unknown whether plaintext clients are served.
        Some(Ok(())) if observed.list.is_err() => step("TLS is offered"),
        Some(Ok(())) => {
            let step = step("TLS is offered, but not required");
            if is_local {
                return step;
            }
            step.problem(Outcome::Warning, "tls_not_required").advise(
                Server,
                "clients that don't use TLS are served in plaintext: require TLS (nbdkit \
                 --tls=require, nbd-server force_tls = true)",
            )
        }
        Some(Err(failure)) => {
            let step = step(&format!("TLS isn't offered: STARTTLS: {failure}"));
            tls_refused(step, failure, is_required, wanted, is_local)
        }
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
    const SET_UP: &str = "give it a certificate and key (hexz-nbd --tls-cert and --tls-key, nbdkit \
        --tls=require --tls-certificates, qemu-nbd --tls-creds, nbd-server certfile and keyfile); \
        if it has them, its log says why it can't use them";
    let is_clean = matches!(failure, ProbeError::OptionRefused { .. });
    match wanted {
        _ if is_required => step.problem(Outcome::Bad, "tls_broken").advise(
            Server,
            "it requires TLS and refuses it, so its TLS isn't set up: perhaps it couldn't read \
             certificate or key; check its log",
        ),
        TlsUse::Always => step
            .problem(Outcome::Bad, "tls_not_offered")
            .advise(Server, SET_UP)
            .advise(Client, "or connect without TLS (nbd://), if nobody can eavesdrop on the path"),
        _ if !is_clean => step.problem(Outcome::Bad, "starttls_unanswered").advise(
            Server,
            "a server must answer STARTTLS, at least with an error: use a newer one",
        ),
        _ if is_local => step,
        _ => step
            .problem(Outcome::Warning, "tls_not_offered")
            .advise(Server, SET_UP)
            .advise(Network, "without TLS, anyone on the path can read and change all traffic"),
    }
}
