//! `hexz-nbd man`: generates the manual pages from the definitions behind `--help`.
//!
//! clap_mangen 0.3 can't replace this code: it has no page for a configuration file, joins the lines
//! of lists and examples into one paragraph, lists all options in the synopsis, and describes no
//! subcommands on the page of their command.

mod command;
mod file;
mod page;
mod text;

use std::fs;
use std::path::Path;

use clap::CommandFactory;

use crate::cli::{Cli, Man};
use crate::commands::output;
use crate::exit_status::{Failure, WriteError};

use command::SubcommandPlacement;
use page::ManualPage;

/// Text of the program's page that `--help` doesn't have.
const EXTRA_TEXT: &str = include_str!("words/hexz-nbd.txt");

/// Prints the page of the program, or writes all pages into a folder.
pub(crate) fn run(options: &Man) -> Result<(), Failure> {
    let pages = pages();
    let Some(dir) = &options.dir else {
        let first = pages.first().map(|(_, page)| page.render()).unwrap_or_default();
        return output::print(first);
    };
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| WriteError { path, error }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    for (name, page) in pages {
        let path = dir.join(name);
        fs::write(&path, page.render()).map_err(failed(&path))?;
    }
    Ok(())
}

/// Returns all pages with the names of their files; that of the program is first.
fn pages() -> Vec<(String, ManualPage)> {
    let mut program = Cli::command();
    program.build();
    let page = command::page(&program, "hexz-nbd", &SubcommandPlacement::OwnPages, EXTRA_TEXT);
    let mut pages = vec![("hexz-nbd.1".to_owned(), page)];
    for command in program.get_subcommands().filter(|it| command::is_documented(it)) {
        let name = format!("hexz-nbd-{}", command.get_name());
        let page = command::page(
            command,
            &name,
            &SubcommandPlacement::SamePage,
            "SEE ALSO\n  hexz-nbd(1)",
        );
        pages.push((format!("{name}.1"), page));
    }
    pages.push(("hexz-nbd.toml.5".to_owned(), file::page(&program)));
    pages
}
