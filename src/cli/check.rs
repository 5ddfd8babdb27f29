//! Options of `hexz-nbd check`, which evaluates the access rules for a client.

use clap::Args;
use nbd_gateway::access::{AccessRequest, Fact, Identity, IdentityName, NameKind, Peer, Timestamp};

use super::access::Access;
use super::values::unix_time;

#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) access: Access,
    /// Address of the client: an IP address, unix, or vsock:CID
    #[arg(long, value_name = "ADDRESS")]
    from: Peer,
    /// Name in the client's certificate, such as uri:spiffe://corp/backup/1, dns:NAME,
    /// email:ADDRESS, cn:NAME or sha256:HASH; without such a prefix, it matches rules for any kind
    /// [repeatable; default: a client without a certificate]
    #[arg(long = "as", value_name = "IDENTITY")]
    identities: Vec<String>,
    /// Time of the request, such as 2027-01-31T18:00:00Z [default: now]
    #[arg(long, value_name = "TIME", value_parser = unix_time)]
    at: Option<Timestamp>,
    /// Export that the client requests [default: any]
    #[arg(value_name = "NAME")]
    export: Option<String>,
}

impl Check {
    /// Calls `ask` with the access that the options describe.
    pub(crate) fn with_request<T>(&self, ask: impl FnOnce(&AccessRequest<'_>) -> T) -> T {
        let names: Vec<IdentityName> =
            self.identities.iter().flat_map(|text| names(text)).collect();
        let identity = (!names.is_empty()).then(|| Identity::new(names));
        ask(&AccessRequest {
            peer: self.from,
            identity: Fact::Known(identity.as_ref()),
            export: self.export.as_deref().map_or(Fact::Pending, Fact::Known),
            now: self.at.unwrap_or_else(Timestamp::now),
        })
    }
}

/// Parses the name of a certificate. A text without a kind gives a name of each kind.
fn names(text: &str) -> Vec<IdentityName> {
    let kinds = NameKind::ALL.into_iter();
    let of_kind = kinds.clone().find_map(|kind| {
        let name = text.strip_prefix(kind.prefix())?;
        Some(vec![IdentityName { kind, text: name.to_owned() }])
    });
    of_kind
        .unwrap_or_else(|| kinds.map(|kind| IdentityName { kind, text: text.to_owned() }).collect())
}
