//! Advice on requests that fail, whatever they are for, and on lists of objects.

use object_reader::{ListedObject, ResponseHead, Scheme, StoreError, StoreErrorKind};

use super::{Client, Network, Server};
use crate::commands::doctor::report::{Step, escape_and_cut};
use crate::commands::doctor::store::{Context, MAX_NAMES};
use crate::commands::output::join_first;

/// Builds the step for a request that failed.
pub(crate) fn failed(
    name: &'static str,
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = Step::bad(name, error.kind.label(), escape_and_cut(&error.message));
    let step = match head {
        Some(head) => step.detail("status", head.status()),
        None => step,
    };
    advise_on(step, error.kind, context)
}

fn advise_on(step: Step, kind: StoreErrorKind, context: &Context) -> Step {
    match kind {
        StoreErrorKind::Denied => denied(step, context),
        StoreErrorKind::CredentialsExpired if context.is_signed_url => {
            step.advise(Client, "create a new signed URL, or use credentials of the store")
        }
        StoreErrorKind::CredentialsExpired => step.advise(
            Client,
            "get new credentials (a session token has a limited lifetime), or choose a source that \
             renews them: web-identity, instance, or a file that something else keeps current",
        ),
        StoreErrorKind::ClockSkew => {
            step.advise(Client, "synchronize this machine's clock (timedatectl set-ntp true)")
        }
        StoreErrorKind::NotFound => step
            .advise(
                Client,
                "check bucket and key in the URL, with upper and lower case; --store-endpoint and \
                 --store-style decide where the bucket is searched for",
            )
            .advise(Server, "or upload the object"),
        StoreErrorKind::Throttled => step
            .advise(Server, "raise its rate limits")
            .advise(Client, "or wait, and use fewer --store-connections"),
        StoreErrorKind::ServerError => step.advise(Server, "check its log"),
        StoreErrorKind::TimedOut => step
            .advise(Server, "it is overloaded or hangs; check its log")
            .advise(Network, "or the path to it loses packets"),
        StoreErrorKind::Unreachable | StoreErrorKind::Interrupted => step
            .advise(Network, "check the path to the server: firewalls, proxies, load balancers")
            .advise(Server, "or check its log"),
        StoreErrorKind::Changed => step.advise(
            Server,
            "objects that are in use must not be replaced: upload new versions under new names",
        ),
        _ => step.advise(Server, "let it, and caches on the way, respond as RFC 9110 says"),
    }
}

fn denied(step: Step, context: &Context) -> Step {
    let step = match (context.scheme, context.is_anonymous) {
        (Scheme::Http | Scheme::Https, true) => step.advise(
            Client,
            "give credentials with --store-credentials FILE (\"Bearer TOKEN\" or USER:PASSWORD), or \
             use a signed URL",
        ),
        (_, true) => step.advise(
            Client,
            "anonymous requests aren't allowed: choose credentials with --store-credentials",
        ),
        (_, false) if context.is_signed_url => {
            step.advise(Client, "sign the URL for GET, with credentials that may read the object")
        }
        _ => step.advise(Client, "check which credentials are used (step \"credentials\")"),
    };
    step.advise(
        Server,
        match context.scheme {
            Scheme::S3 => {
                "or permit s3:GetObject on the object, and s3:ListBucket on the bucket; without the \
                 latter, a missing object is reported as denied, too"
            }
            Scheme::Gcs => "or grant the role Storage Object Viewer on the bucket",
            Scheme::Azure => "or grant the role Storage Blob Data Reader on the container",
            Scheme::Http | Scheme::Https => {
                "or permit it: access rules of the server, permissions of the file and of all folders \
                 above it"
            }
        },
    )
}

/// Builds the step for a folder that can't be listed.
pub(crate) fn list_failed(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = failed("list", error, head, context);
    match (error.kind, context.scheme) {
        (StoreErrorKind::Denied, Scheme::S3) => {
            step.advise(Server, "listing a folder takes s3:ListBucket on the bucket")
        }
        (StoreErrorKind::Unsupported, _) => {
            step.advise(Client, "or name each archive instead of the folder")
        }
        _ => step,
    }
}

pub(crate) fn listed(objects: &[ListedObject]) -> Step {
    let names: Vec<String> = objects.iter().map(|object| escape_and_cut(&object.name)).collect();
    let shown = names.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>();
    if objects.is_empty() {
        return Step::bad("list", "empty_folder", "no objects in the folder")
            .detail("objects", 0)
            .advise(Client, "check the folder's name; objects in folders below it don't count")
            .advise(Server, "or upload the archives");
    }
    Step::good("list", format!("{} objects: {}", objects.len(), join_first(&names, MAX_NAMES)))
        .detail("objects", objects.len())
        .detail("names", shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_named_by_the_kind_of_store() {
        let error = StoreError {
            kind: StoreErrorKind::Denied,
            message: "status 403".to_owned(),
            retry_after: None,
        };
        for (scheme, word) in [
            (Scheme::S3, "s3:GetObject"),
            (Scheme::Gcs, "Storage Object Viewer"),
            (Scheme::Azure, "Storage Blob Data Reader"),
            (Scheme::Https, "permissions of the file"),
        ] {
            for (is_anonymous, is_signed_url) in [(true, false), (false, true), (false, false)] {
                let context = Context { scheme, is_anonymous, is_signed_url };
                let step = failed("object", &error, None, &context);
                let sides: Vec<_> = step.advice.iter().map(|it| it.side).collect();
                assert_eq!(sides, [Client, Server]);
                assert!(step.advice[1].text.contains(word), "{:?}", step.advice);
            }
        }
    }
}
