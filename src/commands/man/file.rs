//! Builds the manual page of the configuration file.

use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use crate::settings::keys::{self, Kind};

use super::command;
use super::page::Page;
use super::text;

/// Text of the page, except for the keys.
const WORDS: &str = include_str!("words/hexz-nbd.toml.txt");

/// Heading of the section that lists the keys.
const KEYS: &str = "KEYS";

/// Builds the page of the configuration file that `program` can read.
pub(super) fn page(program: &Command) -> Page {
    let about = "configuration of hexz-nbd(1)";
    let mut page = Page::new("hexz-nbd.toml", "5", "File Formats", about);
    for section in text::parse(WORDS) {
        page.section(&section);
        if section.heading == KEYS {
            let options: Vec<_> = keys::all(program).collect();
            command::grouped(&mut page, &options, key);
        }
    }
    page
}

/// Formats a key with the placeholder of its value.
fn key(option: &Arg) -> Vec<Inline> {
    let value = command::value_name(option);
    let quoted = || [roman("\""), italic(&value), roman("\"")];
    let mut tag = vec![bold(option.get_long().unwrap_or_default()), roman(" = ")];
    match keys::kind(option) {
        Kind::Flag => tag.push(roman("true or false")),
        Kind::Count => tag.push(italic("N")),
        Kind::One if value == "N" => tag.push(italic(value)),
        Kind::One => tag.extend(quoted()),
        Kind::Many => {
            tag.extend(quoted());
            tag.push(roman(" or ["));
            tag.extend(quoted());
            tag.push(roman(", ...]"));
        }
    }
    tag
}
