//! Listings of folders by HTTP servers.

use std::collections::BTreeSet;

use percent_encoding::percent_decode_str;
use serde::Deserialize;

use crate::listing::MAX_LISTED;

/// Entry of a listing in JSON, of nginx (`autoindex_format json`) or Caddy.
#[derive(Deserialize)]
struct Entry {
    name: String,
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    is_dir: bool,
}

/// Parses a listing in JSON. Returns the names of objects, sorted.
///
/// # Errors
/// The text isn't such a listing, or has too many names.
pub fn parse_json_index(text: &str) -> Result<Vec<String>, &'static str> {
    let entries: Vec<Entry> =
        serde_json::from_str(text).map_err(|_| "the server's JSON isn't a listing")?;
    let is_object =
        |entry: &Entry| !entry.is_dir && entry.kind.as_deref().is_none_or(|kind| kind == "file");
    let names = entries.into_iter().filter(is_object).map(|entry| entry.name);
    collect(names.filter(|name| is_name(name)))
}

/// Parses a listing in HTML, as Apache, nginx, Caddy and Python's `http.server` write it. Returns
/// the names of objects in the folder `prefix`, sorted: those that links in it point to.
///
/// # Errors
/// The text has no links into the folder and isn't an empty listing, or has too many names.
pub fn parse_html_index(text: &str, prefix: &str) -> Result<Vec<String>, &'static str> {
    let mut is_listing = ["Index of", "Directory listing for"].iter().any(|it| text.contains(it));
    let mut names = Vec::new();
    let mut rest = text;
    while let Some((_, tag)) = rest.split_once('<') {
        let Some((tag, after)) = tag.split_once('>') else { break };
        rest = after;
        let Some(link) = href(tag) else { continue };
        let link = resolve_entities(link);
        if matches!(link.as_str(), "../" | ".." | "./..") {
            is_listing = true;
        } else if let Some(name) = name_of_link(&link, prefix) {
            names.push(name);
        }
    }
    if names.is_empty() && !is_listing {
        return Err("the server sent a page without links into the folder");
    }
    collect(names.into_iter())
}

fn collect(names: impl Iterator<Item = String>) -> Result<Vec<String>, &'static str> {
    let names: BTreeSet<String> = names.take(2 * MAX_LISTED).collect();
    if names.len() > MAX_LISTED {
        return Err("it has more than 100,000 names");
    }
    Ok(names.into_iter().collect())
}

/// Returns the attribute `href` of a tag, if it is that of a link.
fn href(tag: &str) -> Option<&str> {
    let attributes = tag.strip_prefix(['a', 'A'])?;
    if !attributes.starts_with(|c: char| c.is_ascii_whitespace()) {
        return None;
    }
    let at = attributes.to_ascii_lowercase().find("href")?;
    let value = attributes.get(at + 4..)?.trim_start().strip_prefix('=')?.trim_start();
    match value.chars().next()? {
        quote @ ('"' | '\'') => value.get(1..)?.split_once(quote).map(|(link, _)| link),
        _ => value.split_ascii_whitespace().next(),
    }
}

fn resolve_entities(text: &str) -> String {
    let entities = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&#x27;", "'"),
        ("&#43;", "+"),
        // The last one, so that what it results in isn't resolved again.
        ("&amp;", "&"),
    ];
    entities.iter().fold(text.to_owned(), |text, (entity, c)| text.replace(entity, c))
}

/// Returns the name of an object that a link in the listing of `prefix` points to.
fn name_of_link(link: &str, prefix: &str) -> Option<String> {
    // An encoded slash would be a part of a name.
    if link.contains(['?', '#']) || link.to_ascii_lowercase().contains("%2f") {
        return None;
    }
    let decoded = percent_decode_str(link).decode_utf8().ok()?;
    let name = match decoded.strip_prefix('/') {
        Some(path) => path.strip_prefix(prefix)?,
        None => decoded.strip_prefix("./").unwrap_or(&decoded),
    };
    // A colon in a relative link would follow a scheme; servers encode it.
    let has_scheme = link.split('/').next().is_some_and(|first| first.contains(':'));
    (!has_scheme && is_name(name)).then(|| name.to_owned())
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains('/') && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_of_common_servers_are_parsed() {
        let nginx = "<html>\r\n<head><title>Index of /v7/</title></head>\r\n<body>\r\n<h1>Index of \
            /v7/</h1><hr><pre><a href=\"../\">../</a>\r\n<a href=\"old/\">old/</a> 30-Nov-2026\r\n\
            <a href=\"a%20b%2Bc.hxz\">a b+c.hxz</a> 30-Nov-2026 10:00  12\r\n</pre></body></html>";
        let apache = "<title>Index of /v7</title><table><tr><th><a href=\"?C=N;O=D\">Name</a></th>\
            <tr><td><a href=\"/\">Parent Directory</a><tr><td>\
            <a href=\"a%20b%2Bc.hxz\">a b+c.hxz</a><A HREF='x&amp;y'>x&amp;y</A>";
        let caddy = "<a href=\"..\">up</a><a class=\"n\" href=\"./a%20b+c.hxz\">x</a>\
            <a href=\"./a%20b+c.hxz\">again</a><a href=\"./old/\">old</a>";
        let python = "<!DOCTYPE HTML><title>Directory listing for /v7/</title><ul>\n<li>\
            <a href=\"a%20b%2Bc.hxz\">a b+c.hxz</a></li><li><a href=\"/v7/abs\">abs</a>";
        let name = "a b+c.hxz".to_owned();
        assert_eq!(parse_html_index(nginx, "v7/"), Ok(vec![name.clone()]));
        assert_eq!(parse_html_index(apache, "v7/"), Ok(vec![name.clone(), "x&y".to_owned()]));
        assert_eq!(parse_html_index(caddy, "v7/"), Ok(vec![name.clone()]));
        assert_eq!(parse_html_index(python, "v7/"), Ok(vec![name, "abs".to_owned()]));
        let empty = "<h1>Index of /</h1>";
        assert_eq!(parse_html_index(empty, ""), Ok(vec![]));
    }

    #[test]
    fn links_elsewhere_are_ignored() {
        for link in [
            "https://elsewhere/x",
            "//elsewhere/x",
            "/other/x",
            "mailto:x",
            "javascript:x",
            "a/b",
            "x?y",
            "x#y",
            "..",
            ".",
            "%2e%2e",
            "a%2Fb",
            "%2fa",
            "a%00",
            "%ff",
        ] {
            let page = format!("<a href=\"{link}\">x</a><a href=\"ok\">");
            assert_eq!(parse_html_index(&page, "v7/"), Ok(vec!["ok".to_owned()]), "{link}");
        }
        assert!(parse_html_index("<html><link href=\"style.css\">hello", "v7/").is_err());
    }

    #[test]
    fn listings_in_json_are_parsed() {
        let nginx = r#"[{"name":"old","type":"directory"},{"name":"b","type":"file","size":1},
            {"name":"../x","type":"file"}]"#;
        assert_eq!(parse_json_index(nginx), Ok(vec!["b".to_owned()]));
        let caddy = r#"[{"name":"old/","is_dir":true},{"name":"b","is_dir":false,"size":1}]"#;
        assert_eq!(parse_json_index(caddy), Ok(vec!["b".to_owned()]));
        assert!(parse_json_index("{}").is_err());
    }
}
