//! Implements `hexz-nbd warm`: fills a disk cache.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use bytesize::ByteSize;
use hexz_exports::{PrefetchError, PrefetchOptions, PrefetchSummary, prefetch};
use hexz_reader::storage::is_url;
use hexz_reader::{OpenOptions, Snapshot};
use nbd_telemetry::escape;

use crate::cli::{SecretUrls, StoreOptions, Warm};
use crate::commands::output;
use crate::exit_status::{self, ExitStatus, Failure, fixed_exit_status};
use crate::service::{archives, remote};

/// An archive that isn't remote.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not a URL: only remote archives are kept in a disk cache")]
struct NotRemote(String);

fixed_exit_status! { NotRemote => USAGE, "usage"; }

impl ExitStatus for PrefetchError {
    fn exit_status(&self) -> u8 {
        exit_status::ARCHIVE
    }

    fn label(&self) -> &'static str {
        Self::label(self)
    }
}

/// Fetches what is missing, and prints a line for each archive.
pub(crate) fn run(options: &Warm) -> Result<ExitCode, Failure> {
    let mut urls = options.archives.clone();
    if let Some(path) = urls.iter().find(|path| !is_url(path)) {
        return Err(NotRemote(escape::path(path).to_string()).into());
    }
    let mut open = archives::options(&options.opening)?;
    let mut trace_options = options.traces.clone();
    let folders = open.parent_dirs.iter_mut().chain(&mut trace_options.traces);
    let secret_urls = SecretUrls::take_from(&mut urls, folders);
    let stores = StoreOptions { secret_urls, ..options.stores.clone() };
    let traces = trace_options.folder();
    let all = urls.iter().chain(&open.parent_dirs).chain(&traces).filter(|path| is_url(path));
    let Some((source, cache)) = remote::connect_for_warming(&stores, all, &options.disk_cache)?
    else {
        return Ok(ExitCode::SUCCESS);
    };
    open.remote = Some(source);
    let options = PrefetchOptions {
        traces: trace_options.place(),
        rate: options.traces.prefetch_rate.as_u64(),
        max_bytes: options.disk_cache.disk_cache_size.as_u64(),
        ready_when_warm: false,
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let result = urls.iter().try_for_each(|url| warm(url, &runtime, &open, &options));
    drop(runtime);
    // What was fetched before a failure is kept.
    cache.close();
    result.map(|()| ExitCode::SUCCESS)
}

fn warm(
    url: &Path,
    runtime: &tokio::runtime::Runtime,
    open: &OpenOptions,
    options: &PrefetchOptions,
) -> Result<(), Failure> {
    let snapshot = {
        let _within = runtime.enter();
        Arc::new(Snapshot::open(url, open)?)
    };
    let PrefetchSummary { fetched, wanted, is_cut } =
        runtime.block_on(prefetch(&snapshot, open, options))?;
    let size = |bytes| ByteSize(bytes).display().iec().to_string();
    let name = escape::path(url);
    output::print(format!("{:>10} of {:>10} fetched: {name}\n", size(fetched), size(wanted)))?;
    if is_cut {
        tracing::warn!(
            reason = "disk_cache_too_small",
            "{name}: more is needed than the disk cache can hold; the rest was not fetched"
        );
    }
    Ok(())
}
