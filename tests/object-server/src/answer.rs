//! A response before a [`Behavior`](crate::Behavior) is applied to it.

use std::ops::Range;

use bytes::Bytes;

use crate::body::Bytestream;
use crate::encoding::escape;

/// A response: status, headers, and where its body comes from.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// S3 error code; empty if this isn't an error.
    pub(crate) code: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Bytestream,
    pub(crate) length: u64,
    /// Part of the object that the body contains.
    pub(crate) served: Option<Range<u64>>,
}

impl Answer {
    /// Creates a response with a short body.
    pub(crate) fn text(status: u16, content_type: &str, text: impl Into<Bytes>) -> Self {
        let text = text.into();
        Self {
            status,
            code: String::new(),
            headers: vec![("content-type".to_owned(), content_type.to_owned())],
            length: text.len() as u64,
            body: Bytestream::Fixed(text),
            served: None,
        }
    }

    /// Creates a response without a body, such as 304.
    pub(crate) fn empty(status: u16) -> Self {
        Self { headers: Vec::new(), ..Self::text(status, "", "") }
    }

    /// Creates an error response, with a body as that of S3.
    pub(crate) fn error(status: u16, code: &str) -> Self {
        let text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{code}\
             </Message><RequestId>0</RequestId></Error>",
            code = escape(code)
        );
        Self { code: code.to_owned(), ..Self::text(status, "application/xml", text) }
    }

    /// Creates an error response with a body as that of a web server.
    pub(crate) fn html_error(status: u16, code: &str) -> Self {
        let text = format!("<html><head><title>{status}</title></head></html>\n");
        Self { code: code.to_owned(), ..Self::text(status, "text/html", text) }
    }

    /// Adds a header.
    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}
