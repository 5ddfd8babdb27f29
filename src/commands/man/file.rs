//! Builds the manual page of the configuration file.

use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use crate::settings::keys::{self, ValueKind};

use super::command;
use super::page::ManualPage;
use super::text;

/// Text of the page, except for the keys.
const PAGE_TEXT: &str = include_str!("words/hexz-nbd.toml.txt");

/// Heading of the section that lists the keys.
const KEYS_HEADING: &str = "KEYS";

/// Builds the page of the configuration file that `program` can read.
pub(super) fn page(program: &Command) -> ManualPage {
    let about = "configuration of hexz-nbd(1)";
    let mut page = ManualPage::new("hexz-nbd.toml", "5", "File Formats", about);
    for section in text::parse(PAGE_TEXT) {
        page.section(&section);
        if section.heading == KEYS_HEADING {
            let options: Vec<_> = keys::all(program).collect();
            command::grouped(&mut page, &options, key_tag);
        }
    }
    page
}

/// Formats a key with the placeholder of its value.
fn key_tag(option: &Arg) -> Vec<Inline> {
    let value = command::value_name(option);
    let quoted = || [roman("\""), italic(&value), roman("\"")];
    let mut tag = vec![bold(option.get_long().unwrap_or_default()), roman(" = ")];
    match keys::kind(option) {
        ValueKind::Flag => tag.push(roman("true or false")),
        ValueKind::Count => tag.push(italic("N")),
        ValueKind::One if value == "N" => tag.push(italic(value)),
        ValueKind::One => tag.extend(quoted()),
        ValueKind::Many => {
            tag.extend(quoted());
            tag.push(roman(" or ["));
            tag.extend(quoted());
            tag.push(roman(", ...]"));
        }
    }
    tag
}
