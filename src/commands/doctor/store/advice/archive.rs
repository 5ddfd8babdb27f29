//! Advice on the content of an object: the archive, its parents and its tree file.

use hexz_reader::ErrorKind;
use object_reader::StoreError;

use super::{Client, Server};
use crate::commands::doctor::report::{Step, escape_and_cut};

pub(crate) fn not_an_archive(kind: &ErrorKind, start: &[u8]) -> Step {
    let step = Step::bad("header", kind.label(), escape_and_cut(&kind.to_string()));
    let is_page = start.trim_ascii_start().starts_with(b"<");
    match kind {
        ErrorKind::NotHexz if is_page => step
            .line("it is a page of text, in HTML or XML")
            .advise(Client, "use the URL of the archive itself, not of a page about it"),
        ErrorKind::NotHexz => step.advise(Client, "give the URL of a Hexz archive"),
        _ => step.advise(Server, "upload the archive again; \"hexz-nbd verify\" checks the file"),
    }
}

pub(crate) fn header(parents: usize) -> Step {
    let found = match parents {
        0 => "a Hexz archive without parents".to_owned(),
        1 => "a Hexz archive with a parent".to_owned(),
        more => format!("a Hexz archive with {more} parents"),
    };
    Step::good("header", found).detail("parents", parents)
}

/// Builds the step about parents: names, with what is wrong with them. The names may be those of the
/// first `count` ones.
pub(crate) fn parents(found: &[(String, Option<String>)], count: usize) -> Step {
    const NAME: &str = "parents";
    let missing = found.iter().filter(|(_, problem)| problem.is_some()).count();
    let step = match missing {
        0 => Step::good(NAME, format!("{} of {count} looked for, all found", found.len())),
        _ => Step::warning(
            NAME,
            "parent_not_beside",
            format!("{missing} of {} can't be read beside the archive", found.len()),
        )
        .advise(Server, "upload the parents into the archive's folder, under these names")
        .advise(Client, "or name the folder that has them with --parent-dir URL"),
    };
    let names: Vec<&str> = found.iter().map(|(name, _)| &**name).collect();
    let step = step.detail("names", names);
    found.iter().fold(step, |step, (name, problem)| match problem {
        None => step.line(format!("{name}: found")),
        Some(problem) => step.line(format!("{name}: {problem}")),
    })
}

pub(crate) fn no_tree(error: &StoreError, is_absent: bool) -> Step {
    if is_absent {
        return Step::good("tree file", "none; only --digest needs one")
            .line("with --digest, the archive is read as a whole when it is opened (hexz-nbd tree)")
            .detail("found", false);
    }
    let found = format!("can't be read: {}", escape_and_cut(&error.message));
    Step::warning("tree file", "tree_unreadable", found)
        .advise(Server, "with --digest, archives are read as a whole without it: make it readable")
}

pub(crate) fn wrong_tree(found: &str) -> Step {
    Step::warning("tree file", "wrong_tree", format!("not that of this archive: {found}")).advise(
        Server,
        "create it with \"hexz-nbd tree\" again, and upload it with the archive: with --digest, the \
         archive is read as a whole otherwise",
    )
}
