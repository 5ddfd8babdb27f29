//! Listings of folders by HTTP servers, in HTML and JSON: names that come of any text are those of
//! objects in the folder, and a listing as servers write it is read completely.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use arbitrary::{Arbitrary, Unstructured};
use object_reader::{parse_html_index, parse_json_index};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    prefix: Prefix,
    text: &'a str,
    entries: Vec<Entry<'a>>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Prefix {
    Root,
    Folder,
    Strange,
}

#[derive(Debug, Arbitrary)]
struct Entry<'a> {
    name: &'a str,
    is_folder: bool,
    style: Style,
}

/// How a server writes a link.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Style {
    Relative,
    Dotted,
    Absolute,
    SingleQuotes,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let prefix = match input.prefix {
        Prefix::Root => "",
        Prefix::Folder => "v7/",
        Prefix::Strange => "a b/ü&/",
    };
    for names in [parse_html_index(input.text, prefix), parse_json_index(input.text)] {
        names.iter().for_each(|names| assert_fit(names));
    }
    let expected: Vec<String> = input
        .entries
        .iter()
        .filter(|entry| !entry.is_folder && is_name(entry.name))
        .map(|entry| entry.name.to_owned())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let html = html(&input.entries, prefix);
    assert_eq!(parse_html_index(&html, prefix).as_ref(), Ok(&expected), "{html}");
    let json = json(&input.entries);
    assert_eq!(parse_json_index(&json).as_ref(), Ok(&expected), "{json}");
}

fn assert_fit(names: &[String]) {
    assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
    assert!(names.iter().all(|name| is_name(name)), "{names:?}");
}

/// Returns true if it may be the last component of a key.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && name.chars().all(|c| c != '/' && !c.is_control())
}

/// Writes a listing like nginx and others do.
fn html(entries: &[Entry<'_>], prefix: &str) -> String {
    let mut page = "<html><head><title>Index of /</title></head><a href=\"../\">../</a>".to_owned();
    for entry in entries {
        let mut link = encoded(entry.name);
        if entry.is_folder {
            link.push('/');
        }
        let quote = if matches!(entry.style, Style::SingleQuotes) { '\'' } else { '"' };
        let before = match entry.style {
            Style::Relative | Style::SingleQuotes => String::new(),
            Style::Dotted => "./".to_owned(),
            Style::Absolute => {
                format!("/{}", prefix.split('/').map(encoded).collect::<Vec<_>>().join("/"))
            }
        };
        page += &format!("<a class=x href={quote}{before}{link}{quote}>a &lt; b</a> 1 <br>\n");
    }
    page
}

fn encoded(name: &str) -> String {
    name.bytes().fold(String::new(), |mut text, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => text.push(byte.into()),
            // Writing to a string can't fail.
            other => drop(write!(text, "%{other:02X}")),
        }
        text
    })
}

fn json(entries: &[Entry<'_>]) -> String {
    let entry = |entry: &Entry<'_>| {
        let units = entry.name.encode_utf16().map(|unit| format!("\\u{unit:04x}"));
        let name: String = units.collect();
        let kind = if entry.is_folder { "directory" } else { "file" };
        match entry.style {
            Style::Relative | Style::Absolute => {
                format!("{{\"name\":\"{name}\",\"type\":\"{kind}\",\"size\":1}}")
            }
            _ => format!("{{\"is_dir\":{},\"name\":\"{name}\"}}", entry.is_folder),
        }
    };
    format!("[{}]", entries.iter().map(entry).collect::<Vec<_>>().join(","))
}
