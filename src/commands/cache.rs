//! Implements `hexz-nbd cache`: shows, checks and clears a disk cache.

use std::fmt::Write;
use std::process::ExitCode;

use bytesize::ByteSize;
use nbd_telemetry::escape;
use object_reader::{CachedObject, DiskCache, DiskCacheCheck, DiskCacheContents, DiskCacheError};

use crate::cli::{Cache, CacheCommand};
use crate::commands::output;
use crate::exit_status::{self, ExitStatus, Failure};

impl ExitStatus for DiskCacheError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        Self::label(self)
    }
}

/// Runs the subcommand.
pub(crate) fn run(options: &Cache) -> Result<ExitCode, Failure> {
    match &options.command {
        CacheCommand::Show(cache) => output::print(show(&DiskCache::inspect(&cache.folder)?))?,
        CacheCommand::Check(cache) => {
            let DiskCacheCheck { good, bad, bytes } = DiskCache::check(&cache.folder)?;
            output::print(format!("{good} parts are good, {bad} are bad; {} read\n", size(bytes)))?;
            if bad > 0 {
                return Ok(ExitCode::from(exit_status::FAILED));
            }
        }
        CacheCommand::Clear(cache) => DiskCache::clear(&cache.folder)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns a line for each object, and one for the whole cache.
fn show(contents: &DiskCacheContents) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let mut line = |bytes: u64, what: &dyn std::fmt::Display| {
        writeln!(text, "{:>10}  {what}", size(bytes)).unwrap_or_default();
    };
    let mut used = contents.other_bytes;
    for CachedObject { store, key, version, opened, bytes, .. } in &contents.objects {
        used += bytes;
        let (name, opened) = (format!("{store}/{key}"), output::format_time(*opened));
        let length = size(version.length);
        line(*bytes, &format_args!("of {length}, opened {opened}: {}", escape::path(&name)));
    }
    if contents.other_bytes > 0 {
        line(contents.other_bytes, &"of former versions");
    }
    let in_use = if contents.is_in_use { ", in use" } else { "" };
    let capacity = size(contents.size);
    line(used, &format_args!("in all, of {capacity}{in_use}"));
    text
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}
