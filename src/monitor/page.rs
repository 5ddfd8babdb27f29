//! The status page: one file, with a policy that lets browsers run and load nothing else.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::header::HeaderValue;

use super::reasons::AllWords;

const HTML: &str = include_str!("page.html");

/// Place in the page for the words that describe labels.
const WORDS: &str = "{ /* filled in by page.rs */ }";

/// The page and its content security policy.
#[derive(Debug)]
pub(super) struct StatusPage {
    html: Bytes,
    policy: HeaderValue,
}

impl StatusPage {
    pub(super) fn new() -> Self {
        // Maps of texts can always be serialized.
        let words = serde_json::to_string(&AllWords::new()).unwrap_or_else(|_| "{}".to_owned());
        let html = HTML.replacen(WORDS, &words, 1);
        // The policy has only characters that are valid in a header.
        let policy = HeaderValue::from_str(&policy(&html))
            .unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"));
        Self { html: Bytes::from(html), policy }
    }

    pub(super) fn html(&self) -> Bytes {
        self.html.clone()
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

    #[test]
    fn the_page_has_words_for_labels() {
        assert_eq!(HTML.matches(WORDS).count(), 1);
        let html = StatusPage::new().html();
        let html = str::from_utf8(&html).unwrap();
        assert!(!html.contains(WORDS));
        assert!(html.contains(r#""not_hexz":"not a Hexz archive""#));
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
