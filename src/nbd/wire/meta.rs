//! Metadata contexts in negotiation (`NBD_OPT_LIST_META_CONTEXT`,
//! `NBD_OPT_SET_META_CONTEXT`, "Metadata querying").

use super::{Malformed, Reader, clip};

/// The data of both options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export's name, as bytes.
    pub name: &'a [u8],
    /// What is asked for: names of contexts, and patterns.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> MetaRequest<'a> {
    /// Reads an option's data.
    ///
    /// # Errors
    /// "such as a query length that would require reading beyond the original length given
    /// in the option header", bytes that are left over, or a query without the colon that
    /// ends its namespace.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let name = reader.string("the export's name")?;
        let count = reader.u32("the number of queries")? as usize;
        // Each query has its own length field, so the data bounds them.
        let mut queries = Vec::with_capacity(count.min(data.len() / 4));
        for _ in 0..count {
            let query = reader.string("a query")?;
            if !query.contains(&b':') {
                return Err(Malformed::NoNamespace);
            }
            queries.push(query);
        }
        reader.finish()?;
        Ok(Self { name, queries })
    }

    /// The bytes that a client sends.
    pub fn encode(&self) -> Vec<u8> {
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let mut out = length(self.name.len()).to_vec();
        out.extend(self.name);
        out.extend(length(self.queries.len()));
        for query in &self.queries {
            out.extend(length(query.len()));
            out.extend(*query);
        }
        out
    }
}

/// The data of `NBD_REP_META_CONTEXT`.
pub fn meta_context_data(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(clip(name).as_bytes());
    out
}

/// Whether a query of LIST means the context `name`: by its name, or by a part of it that
/// ends with a colon, as `base:` and `qemu:dirty-bitmap:` do.
pub fn lists(query: &[u8], name: &str) -> bool {
    selects(query, name) || (query.ends_with(b":") && name.as_bytes().starts_with(query))
}

/// Whether a query of SET means the context `name`: by its name alone ("the empty
/// leaf-name … SHOULD NOT select any contexts").
pub fn selects(query: &[u8], name: &str) -> bool {
    query == name.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request() {
        let data = b"\0\0\0\x01x\0\0\0\x02\0\0\0\x05base:\0\0\0\x03a:b";
        let request = MetaRequest::decode(data).unwrap();
        assert_eq!(request.name, b"x");
        assert_eq!(request.queries, [&b"base:"[..], b"a:b"]);
        assert_eq!(request.encode(), data);
    }

    // qemu-nbd: bytes left over, and counts and lengths that promise more than there is.
    #[test]
    fn lengths_that_lie() {
        for bad in [
            &b""[..],
            b"\0\0\0\x01x",
            b"\0\0\0\x01x\0\0\0\x01",
            b"\0\0\0\x01x\0\0\0\x00\0",
            b"\0\0\0\x01x\0\0\0\x01\0\0\0\x06base:",
            b"\0\0\0\x01x\0\0\0\x01\0\0\0\x04base:",
            b"\0\0\0\x01x\xff\xff\xff\xff\0\0\0\x05base:",
            b"\xff\xff\xff\xffx\0\0\0\x00",
            b"\0\0\0\x01x\0\0\0\x01\0\0\0\x04base",
        ] {
            assert!(MetaRequest::decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn wildcards_list_and_do_not_select() {
        let name = "qemu:dirty-bitmap:a";
        for query in ["qemu:", "qemu:dirty-bitmap:", name] {
            assert!(lists(query.as_bytes(), name), "{query}");
        }
        for query in ["qemu:dirty", "base:", "", "qemu:dirty-bitmap:ab", "qemu:dirty-bitmap"] {
            assert!(!lists(query.as_bytes(), name), "{query}");
        }
        assert!(selects(name.as_bytes(), name));
        assert!(!selects(b"qemu:", name) && !selects(b"qemu:dirty-bitmap:", name));
    }
}
