//! Advice on credentials, and on the clock, which signatures depend on.

use std::time::{Duration, SystemTime};

use object_reader::{
    CredentialsSummary, ResponseHead, Scheme, StoreConfigError, StoreError, StoreErrorKind,
};

use super::{Client, Network, Server};
use crate::commands::doctor::advice::format_validity;
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};
use crate::commands::doctor::store::Session;
use crate::commands::output::{format_seconds, format_time};

/// Deviation of the clock above which there is a warning.
const CLOCK_WARNING: Duration = Duration::from_secs(60);
/// Deviation of the clock above which stores reject signatures.
const CLOCK_LIMIT: Duration = Duration::from_secs(15 * 60);
/// Remaining lifetime of a signed URL below which there is a warning.
const EXPIRY_WARNING: Duration = Duration::from_secs(24 * 3600);

/// Name of the steps.
const CREDENTIALS: &str = "credentials";

/// Builds the step for credentials that the configuration lacks.
pub(crate) fn no_credentials(error: &StoreConfigError, scheme: Scheme) -> Step {
    let step = Step::bad(CREDENTIALS, "no_credentials", escape_and_cut(&error.to_string()));
    step.advise(
        Client,
        match scheme {
            Scheme::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a source with \
                 --store-credentials: a file in the form of ~/.aws/credentials, instance, \
                 web-identity, or anonymous for a public bucket"
            }
            Scheme::Gcs => {
                "set GOOGLE_APPLICATION_CREDENTIALS, or name a source with --store-credentials: a \
                 service account's key, instance, or anonymous for a public bucket"
            }
            Scheme::Azure => {
                "set AZURE_STORAGE_KEY, or name a source with --store-credentials: a file with an \
                 account key or a SAS token, instance, web-identity, or anonymous"
            }
            Scheme::Http | Scheme::Https => {
                "--store-credentials names a file that contains \"Bearer TOKEN\" or USER:PASSWORD"
            }
        },
    )
}

/// Builds the step for credentials that can't be obtained from their source.
pub(crate) fn credentials_failed(error: &StoreError) -> Step {
    let step = Step::bad(CREDENTIALS, error.kind.label(), escape_and_cut(&error.message));
    match error.kind {
        StoreErrorKind::Unreachable | StoreErrorKind::TimedOut => step
            .advise(Network, "let this machine reach the service that issues the credentials")
            .advise(Client, "or choose another source with --store-credentials"),
        _ => step.advise(
            Client,
            "check the role and its trust policy, the file, or choose another source with \
             --store-credentials",
        ),
    }
}

/// Builds the step about the source of the credentials. The error ends the examination.
pub(crate) fn credentials(
    summary: &CredentialsSummary,
    now: SystemTime,
) -> Result<Step, Box<Step>> {
    if summary.is_anonymous {
        return Ok(Step::good(CREDENTIALS, "none: requests are anonymous").detail("source", "none"));
    }
    let source = escape_and_cut(&summary.source);
    let step = Step::good(CREDENTIALS, format!("from {source}")).detail("source", source);
    let Some(expiry) = summary.expiry else {
        return Ok(step.detail("expires", serde_json::Value::Null));
    };
    let time = format_time(expiry);
    let step = step.detail("expires", time.clone());
    let Ok(left) = expiry.duration_since(now) else {
        return Err(Box::new(
            step.problem(Outcome::Bad, "credentials_expired")
                .line(format!("expired at {time}"))
                .advise(Client, "get new ones")
                .advise(Client, "or correct this machine's clock, if it is wrong"),
        ));
    };
    let step = step.line(format!("expire at {time}, in {}", format_validity(left)));
    let is_renewed = summary.source != "the query of the URL";
    Ok(if is_renewed || left > EXPIRY_WARNING {
        step
    } else {
        step.problem(Outcome::Warning, "expires_soon").advise(
            Client,
            "a signed URL can't be renewed: after that time nothing can be read. Use credentials of \
             the store instead",
        )
    })
}

/// Compares the clocks. Returns `None` if the server doesn't send its time.
pub(crate) fn clock(head: &ResponseHead, session: &Session) -> Option<Step> {
    let (server, here) = head.clocks()?;
    Some(compare_clocks(server, here, session.credentials.signs_with_clock))
}

fn compare_clocks(server: SystemTime, here: SystemTime, is_signed: bool) -> Step {
    const NAME: &str = "clock";
    let (apart, is_fast) = match here.duration_since(server) {
        Ok(ahead) => (ahead, true),
        Err(behind) => (behind.duration(), false),
    };
    // The server's time has a resolution of one second.
    if apart < Duration::from_secs(2) {
        return Step::good(NAME, "agrees with the server's").detail("seconds", 0);
    }
    let seconds = i64::try_from(apart.as_secs()).unwrap_or(i64::MAX);
    let direction = if is_fast { "ahead of" } else { "behind" };
    let length = if apart < 2 * CLOCK_WARNING {
        format_seconds(apart.as_secs_f64())
    } else {
        format_validity(apart)
    };
    let step = Step::good(NAME, format!("{length} {direction} the server's"))
        .detail("seconds", if is_fast { seconds } else { -seconds });
    let outcome = match apart {
        apart if apart > CLOCK_LIMIT && is_signed => Outcome::Bad,
        apart if apart > CLOCK_WARNING => Outcome::Warning,
        _ => return step,
    };
    let step = step.problem(outcome, "clock_skew").line(format!(
        "here {}, there {}",
        format_time(here),
        format_time(server)
    ));
    step.advise(
        Client,
        "synchronize this machine's clock (timedatectl set-ntp true); stores reject signatures that \
         are more than 15 minutes old or in the future, and renewing credentials fails, too",
    )
    .advise(Server, "or the clock of the server, or of a cache, if that is wrong")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000 + seconds)
    }

    #[test]
    fn clocks_are_compared_by_what_stores_accept() {
        for (server, here, is_signed, outcome, seconds) in [
            (0, 1, true, Outcome::Good, 0),
            (0, 30, true, Outcome::Good, 30),
            (120, 0, true, Outcome::Warning, -120),
            (0, 901, true, Outcome::Bad, 901),
            (0, 901, false, Outcome::Warning, 901),
        ] {
            let step = compare_clocks(at(server), at(here), is_signed);
            assert_eq!((step.outcome, step.details["seconds"].as_i64()), (outcome, Some(seconds)));
        }
    }

    #[test]
    fn expiry_of_credentials_is_reported() {
        let summary = |source: &str, expiry| CredentialsSummary {
            source: source.to_owned(),
            is_anonymous: false,
            signs_with_clock: true,
            expiry,
        };
        let now = at(0);
        let query = "the query of the URL";
        let soon = credentials(&summary(query, Some(now + HOUR)), now).unwrap();
        assert_eq!(soon.reasons, ["expires_soon"]);
        let renewed = credentials(&summary("elsewhere", Some(now + HOUR)), now).unwrap();
        assert_eq!((renewed.outcome, renewed.lines.len()), (Outcome::Good, 1));
        let expired = credentials(&summary(query, Some(now - HOUR)), now).unwrap_err();
        assert_eq!(expired.reasons, ["credentials_expired"]);
        assert_eq!(credentials(&summary("a file", None), now).unwrap().outcome, Outcome::Good);
    }
}
