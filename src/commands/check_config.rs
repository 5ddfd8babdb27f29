//! Implements `hexz-nbd --check-config`: performs all steps of the startup before listening, and
//! reports everything that fails.

use std::process::ExitCode;

use hexz_exports::{Catalog, FolderTrial};
#[cfg(feature = "remote")]
use hexz_reader::OpenOptions;
use nbd_gateway::Policy;
use nbd_gateway::config::Config;
use nbd_telemetry::escape;

use crate::cli::ServeOptions;
use crate::commands::output;
use crate::exit_status::{self, Failure};
use crate::hints;
#[cfg(feature = "remote")]
use crate::service::remote;
use crate::service::{access, archives, audit, hidden, password, runtime};
use crate::settings::Settings;

/// Prints what would be served, or logs all errors. The exit code is the one that the startup
/// would have had.
pub(crate) fn run(settings: &Settings) -> Result<ExitCode, Failure> {
    let serve = &settings.cli.serve;
    let config = serve.config();
    let mut failures = Vec::new();
    hidden::warn_hidden(&serve.changeable);
    let policy = access::read_collecting_errors(&serve.changeable, &config);
    let policy = policy.map_err(|all| failures.extend(all.into_iter().map(Failure::from))).ok();
    if let Some(policy) = &policy {
        access::warn_risky(&config, policy);
    }
    if let Err(error) = audit::check(&serve.audit, serve.network.stdio) {
        failures.push(error.into());
    }
    let exports = exports(serve, &mut failures);
    match (policy, exports, failures.first()) {
        (Some(policy), Some(exports), None) => {
            let (to, listen) = (access::describe_access(&policy), listen(&config, &policy));
            let would = format!("would serve {exports} {to}, on {listen}");
            output::print(format!("{}\n", escape::text(&would)))?;
            Ok(ExitCode::SUCCESS)
        }
        (_, _, first) => {
            let code = first.map_or(exit_status::FAILED, Failure::exit_status);
            failures.iter().for_each(Failure::log);
            Ok(ExitCode::from(code))
        }
    }
}

/// Opens the archives as the startup does; skipped if keys or passwords can't be read.
fn exports(serve: &ServeOptions, failures: &mut Vec<Failure>) -> Option<String> {
    let snapshots = &serve.changeable.snapshots;
    let catalog = catalog(serve, failures)?;
    let mut exports = None;
    let opened = runtime::run_until_signal(runtime::prepare(), &mut None, async |shutdown| {
        let opened = shutdown.run_until_cancelled(archives::open(&catalog, snapshots)).await;
        let Some(mut all) = opened.transpose()? else { return Ok(()) };
        if snapshots.export_dir.is_some() {
            let tried = shutdown.run_until_cancelled(try_folder(&catalog)).await;
            let Some(folder) = tried.transpose()? else { return Ok(()) };
            all.push_str(&folder);
        }
        exports = Some(all);
        Ok(())
    });
    if let Err(failure) = opened {
        failures.push(failure);
    }
    exports
}

/// Opens each archive of the folder, logs those that clients couldn't open, and returns how many
/// there are. None of them prevents a start.
async fn try_folder(catalog: &Catalog) -> Result<String, Failure> {
    let FolderTrial { archives, failed } = catalog.try_folder().await?;
    for (name, error) in &failed {
        tracing::error!(
            reason = error.label(),
            hint = hints::of_error(&error.kind),
            "archive {:?} of the folder can't be opened: {error}",
            escape::name(name)
        );
    }
    let count = if archives == 1 { "1 archive".to_owned() } else { format!("{archives} archives") };
    Ok(match failed.len() {
        0 => format!(" ({count})"),
        failed => format!(" ({count}, of which {failed} can't be opened)"),
    })
}

fn catalog(serve: &ServeOptions, failures: &mut Vec<Failure>) -> Option<Catalog> {
    let opening = &serve.changeable.snapshots.opening;
    let password = password::password_source(opening.password_file.as_deref());
    let password = password.map_err(|error| failures.push(error.into())).ok();
    let options = archives::with_password(opening, password.clone().flatten());
    let options = options.map_err(|error| failures.push(error.into())).ok();
    let is_known = password.is_some() && options.is_some();
    let options = options.unwrap_or_default();
    #[cfg(feature = "remote")]
    let options = match remote::connect_directly(
        &serve.stores,
        serve.changeable.snapshots.urls(),
        serve.memory().fetched,
    ) {
        Ok(remote) => OpenOptions { remote, ..options },
        Err(error) => {
            failures.push(error.into());
            return None;
        }
    };
    let catalog = serve.catalog(options);
    let catalog = catalog.map_err(|error| failures.push(error.into())).ok()?;
    is_known.then_some(catalog)
}

fn listen(config: &Config, policy: &Policy) -> String {
    match config.listen.as_slice() {
        [] if policy.rules.is_local_only() => "port 10809 of loopback".to_owned(),
        [] => "port 10809 of every address".to_owned(),
        all => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}
