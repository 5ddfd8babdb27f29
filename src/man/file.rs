//! The page of the configuration file.

use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use crate::settings::keys::{self, Kind};

use super::command;
use super::page::Page;
use super::text;

/// What there is to say beside the keys.
const WORDS: &str = include_str!("words/hexz-nbd.toml.txt");

/// The section that the keys are to be listed in.
const KEYS: &str = "KEYS";

/// The page of the file that `program` can read.
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

/// How a key is written.
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
