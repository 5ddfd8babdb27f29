//! `hexz-nbd inspect`: reports the contents of an archive, from its header and index.

mod json;
mod text;

use std::process::ExitCode;

use hexz_reader::OpenOptions;
use hexz_reader::summary::{ArchiveSummary, PackedFile};

use crate::cli::Inspect;
use crate::commands::output;
use crate::exit_status::{self, Failure};
use crate::service::archives;

/// Inspects an archive and prints the findings.
pub(crate) fn run(options: &Inspect) -> Result<ExitCode, Failure> {
    let opening = options.opening();
    let open = OpenOptions {
        parent_dirs: opening.parent_dir.clone(),
        allow_parent_anywhere: opening.allow_parent_anywhere,
        ..archives::load_keys_and_digests(&opening)?
    };
    let mut archive = options.archive.clone();
    let open = archives::with_stores(open, std::slice::from_mut(&mut archive), &options.stores)?;
    // Bounded, because the manifest is.
    let mut files: Vec<PackedFile> = Vec::new();
    let inspected = ArchiveSummary::of_file(&archive, &open, |file| {
        if options.files {
            files.push(file);
        }
    });
    let facts = inspected?;
    output::print(if options.json {
        output::pretty_json(&json::render(&facts, options.files.then_some(files.as_slice())))
    } else {
        text::page(&facts, &files)
    })?;
    Ok(if facts.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(exit_status::FAILED) })
}
