//! Listings of folders: by HTTP servers, in HTML and JSON, and of buckets, in XML. Names that come
//! of any text are those of objects in the folder, and a listing as servers write it is read
//! completely.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use object_reader::{ListedObject, parse_html_index, parse_json_index, parse_xml_listing};

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
    for cloud in [Cloud::S3, Cloud::Google, Cloud::Azure] {
        check_xml(&input, prefix, cloud);
    }
}

/// Kind of a store whose listings are XML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cloud {
    S3,
    Google,
    Azure,
}

fn check_xml(input: &Input<'_>, prefix: &str, cloud: Cloud) {
    let scheme = match cloud {
        Cloud::S3 => "s3",
        Cloud::Google => "gs",
        Cloud::Azure => "az",
    };
    let url = format!("{scheme}://bucket/{prefix}").parse().unwrap();
    let names = |objects: Vec<ListedObject>| -> BTreeSet<String> {
        objects.into_iter().map(|object| object.name).collect()
    };
    // As it is, and in a place where the parser gets further.
    for page in [input.text.to_owned(), xml(cloud, prefix, &[], input.text)] {
        if let Ok(objects) = parse_xml_listing(&url, Bytes::from(page)) {
            let names = names(objects);
            assert!(names.iter().all(|name| is_name(name)), "{names:?}");
        }
    }
    let fits = |entry: &&Entry<'_>| is_name(entry.name) && entry.name.chars().all(is_in_xml);
    let entries: Vec<_> = input.entries.iter().filter(fits).collect();
    let files = entries.iter().filter(|entry| !entry.is_folder);
    let expected: BTreeSet<String> = files.map(|entry| entry.name.to_owned()).collect();
    let page = xml(cloud, prefix, &entries, "");
    let listed = parse_xml_listing(&url, Bytes::from(page.clone()));
    assert_eq!(listed.map(names).unwrap(), expected, "{page}");
}

/// Returns true if a character stands for itself in XML, without being changed. Spaces at the ends
/// of a name aren't kept.
fn is_in_xml(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !('\u{fffe}'..='\u{ffff}').contains(&c)
}

/// Writes a page of a listing, with `rest` among its elements.
fn xml(cloud: Cloud, prefix: &str, entries: &[&Entry<'_>], rest: &str) -> String {
    let entry = |entry: &&Entry<'_>| {
        let key = escaped(&format!("{prefix}{}", entry.name));
        match (cloud, entry.is_folder) {
            (Cloud::Azure, true) => format!("<BlobPrefix><Name>{key}/</Name></BlobPrefix>"),
            (Cloud::Azure, false) => format!(
                "<Blob><Name>{key}</Name><Properties><Last-Modified>Mon, 30 Nov 2026 00:00:00 \
                 GMT</Last-Modified><Content-Length>1</Content-Length><Content-Type>a/b\
                 </Content-Type><Etag>0x1</Etag></Properties></Blob>"
            ),
            (_, true) => format!("<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>"),
            (_, false) => format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-30T00:00:00.000Z</LastModified>\
                 <ETag>&quot;1&quot;</ETag><Size>1</Size></Contents>"
            ),
        }
    };
    let entries: String = entries.iter().map(entry).collect();
    match cloud {
        Cloud::Azure => {
            format!("<EnumerationResults><Blobs>{entries}{rest}</Blobs></EnumerationResults>")
        }
        _ => format!("<ListBucketResult>{entries}{rest}</ListBucketResult>"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
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
