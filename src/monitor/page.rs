//! The status page: one file, with a policy that lets browsers run and load nothing else.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::header::HeaderValue;

const HTML: &str = include_str!("page.html");

/// The page and its content security policy.
#[derive(Debug)]
pub(super) struct StatusPage {
    policy: HeaderValue,
}

impl StatusPage {
    pub(super) fn new() -> Self {
        let policy = policy(HTML);
        // The policy has only characters that are valid in a header.
        let policy = HeaderValue::from_str(&policy)
            .unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"));
        Self { policy }
    }

    pub(super) fn html(&self) -> Bytes {
        Bytes::from_static(HTML.as_bytes())
    }

    /// Returns the value for the `Content-Security-Policy` header.
    pub(super) fn policy(&self) -> &HeaderValue {
        &self.policy
    }
}

/// Builds a policy that lets the page run the scripts and use the styles that it contains, named by
/// their hashes, and query the monitor, but nothing else. Attributes (`style`, `onclick`) aren't
/// covered.
fn policy(html: &str) -> String {
    let hashes = |tag: &str| {
        let mut all = String::new();
        for inside in contents_of(html, tag) {
            let hash = STANDARD.encode(digest(&SHA256, inside.as_bytes()));
            // Writing to a string can't fail.
            write!(all, " 'sha256-{hash}'").unwrap_or_default();
        }
        if all.is_empty() { " 'none'".to_owned() } else { all }
    };
    format!(
        "default-src 'none'; script-src{}; style-src{}; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hashes("script"),
        hashes("style"),
    )
}

/// Returns the text between each `<tag>` and its end tag.
fn contents_of<'a>(html: &'a str, tag: &str) -> impl Iterator<Item = &'a str> {
    let (start, end) = (format!("<{tag}>"), format!("</{tag}>"));
    let parts: Vec<_> = html
        .split(&start)
        .skip(1)
        .filter_map(|part| part.split_once(&end).map(|(inside, _)| inside))
        .collect();
    parts.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_has_hashes_of_scripts_and_styles() {
        let policy = policy("<style>a{}</style><script>1</script><script>2\n</script>");
        // The hashes were computed with openssl.
        for part in [
            "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=' \
             'sha256-U8I05ehHK2rFHBrhyrP+BvrQU7646/2Jd7AQZVv908M=';",
            "style-src 'sha256-",
            "default-src 'none';",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        assert!(super::policy("").contains("script-src 'none'; style-src 'none';"));
    }

    /// The page must not contain anything that its policy blocks: that would fail without notice.
    #[test]
    fn the_page_complies_with_its_policy() {
        for tag in ["script", "style"] {
            let all = HTML.matches(&format!("<{tag}")).count();
            assert_eq!(contents_of(HTML, tag).count(), all, "{tag} with attributes");
        }
        for forbidden in
            [" style=", " onclick=", " onload=", " src=", "<link", "http://", "@import"]
        {
            assert!(!HTML.contains(forbidden), "{forbidden}");
        }
    }
}
