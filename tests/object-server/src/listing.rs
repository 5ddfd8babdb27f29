//! Listings: ListObjectsV2 of S3, and directory indexes as nginx makes them.

use std::collections::BTreeMap;

use crate::answer::Answer;
use crate::encoding::{escape, http_date, iso_date, percent_encode};
use crate::object::{Object, Objects};

/// Maximum number of keys on a page of S3.
const MAX_KEYS: usize = 1000;

/// Responds to ListObjectsV2 of a bucket.
pub(crate) fn list_objects(objects: &Objects, bucket: &str, query: &[(String, String)]) -> Answer {
    let parameter = |wanted: &str| {
        query.iter().find(|(name, _)| name == wanted).map_or("", |(_, value)| value.as_str())
    };
    let bucket = bucket.trim_end_matches('/');
    let in_bucket = objects.list(&format!("{bucket}/"));
    if in_bucket.is_empty() {
        return Answer::error(404, "NoSuchBucket");
    }
    let (prefix, delimiter) = (parameter("prefix"), parameter("delimiter"));
    let requested = parameter("max-keys").parse().unwrap_or(MAX_KEYS);
    let limit = requested.min(MAX_KEYS);
    // The token is the last name of the page before.
    let token = parameter("continuation-token");
    let after = if token.is_empty() {
        parameter("start-after")
    } else if let Some(name) = token.strip_prefix("after:") {
        name
    } else {
        return Answer::error(400, "InvalidArgument");
    };
    let entries = group(&in_bucket, bucket.len() + 1, prefix, delimiter);
    let mut remaining = entries.iter().filter(|(name, _)| name.as_str() > after);
    let page: Vec<_> = remaining.by_ref().take(limit).collect();
    let next = page.last().filter(|_| remaining.next().is_some()).map(|(name, _)| *name);

    let encodes = parameter("encoding-type") == "url";
    let shown = |name: &str| if encodes { percent_encode(name, true) } else { escape(name) };
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>{}</Name>\
         <Prefix>{}</Prefix><Delimiter>{}</Delimiter><MaxKeys>{limit}</MaxKeys><KeyCount>{}\
         </KeyCount><IsTruncated>{}</IsTruncated>",
        shown(bucket),
        shown(prefix),
        shown(delimiter),
        page.len(),
        next.is_some()
    );
    if let Some(next) = next {
        let token = format!("after:{next}");
        xml += &format!("<NextContinuationToken>{}</NextContinuationToken>", escape(&token));
    }
    for (name, object) in page {
        let name = shown(name);
        xml += &match object {
            None => format!("<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"),
            Some(object) => format!(
                "<Contents><Key>{name}</Key><LastModified>{}</LastModified><ETag>{}</ETag>\
                 <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                iso_date(object.modified),
                escape(&object.etag),
                object.length
            ),
        };
    }
    Answer::text(200, "application/xml", xml + "</ListBucketResult>")
}

/// Responds with an index of a folder, as nginx's `autoindex on` does.
pub(crate) fn html_index(objects: &Objects, folder: &str) -> Answer {
    let title = escape(&format!("Index of /{folder}"));
    let mut html = format!(
        "<html>\n<head><title>{title}</title></head>\n<body>\n<h1>{title}</h1><hr><pre>\
         <a href=\"../\">../</a>\n"
    );
    for (name, object) in folder_entries(objects, folder) {
        let (link, shown) = (percent_encode(&name, true), escape(&name));
        let details = object.map_or("- -".to_owned(), |object| {
            format!("{} {}", http_date(object.modified), object.length)
        });
        html += &format!("<a href=\"{link}\">{shown}</a> {details}\n");
    }
    Answer::text(200, "text/html", html + "</pre><hr></body>\n</html>\n")
}

/// Responds with an index of a folder, as nginx's `autoindex_format json` does.
pub(crate) fn json_index(objects: &Objects, folder: &str) -> Answer {
    let entry = |(name, object): (String, Option<Object>)| {
        let name = name.trim_end_matches('/').replace('\\', "\\\\").replace('"', "\\\"");
        match object {
            None => format!("{{ \"name\":\"{name}\", \"type\":\"directory\" }}"),
            Some(object) => format!(
                "{{ \"name\":\"{name}\", \"type\":\"file\", \"mtime\":\"{}\", \"size\":{} }}",
                http_date(object.modified),
                object.length
            ),
        }
    };
    let entries: Vec<_> = folder_entries(objects, folder).into_iter().map(entry).collect();
    Answer::text(200, "application/json", format!("[\n{}\n]", entries.join(",\n")))
}

fn folder_entries(objects: &Objects, folder: &str) -> BTreeMap<String, Option<Object>> {
    group(&objects.list(folder), folder.len(), "", "/")
}

/// Returns the names below `prefix`, where those that continue after a delimiter are grouped into
/// common prefixes, which have no object. The first `skip` bytes of each key are left out.
fn group(
    objects: &BTreeMap<String, Object>,
    skip: usize,
    prefix: &str,
    delimiter: &str,
) -> BTreeMap<String, Option<Object>> {
    let mut entries = BTreeMap::new();
    for (key, object) in objects {
        let name = key.get(skip..).unwrap_or_default();
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let end = if delimiter.is_empty() { None } else { rest.find(delimiter) };
        match end.and_then(|end| rest.get(..end + delimiter.len())) {
            Some(common) => entries.insert(format!("{prefix}{common}"), None),
            None => entries.insert(name.to_owned(), Some(object.clone())),
        };
    }
    entries
}
