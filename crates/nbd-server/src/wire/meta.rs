//! Metadata contexts in negotiation (`NBD_OPT_LIST_META_CONTEXT`, `NBD_OPT_SET_META_CONTEXT`,
//! "Metadata querying").

use std::collections::HashSet;

use super::{FieldReader, Malformed, truncate_string};

/// Maximum number of distinct queries in one option. Queries are kept until the option has been
/// answered, so this bounds the memory that a client can tie up by not reading the reply.
pub const MAX_QUERIES: usize = 1024;

/// Data of both options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export's name, as bytes.
    pub name: &'a [u8],
    /// Queries: names of contexts, and patterns.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> MetaRequest<'a> {
    /// Decodes an option's data.
    ///
    /// # Errors
    /// A length field is wrong, "such as a query length that would require reading beyond the
    /// original length given in the option header"; bytes are left over; or a query lacks the colon
    /// that ends its namespace.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(data);
        let name = reader.string("the export's name")?;
        let count = reader.u32("the number of queries")? as usize;
        // Each query has its own length field, so the data's length bounds their number.
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

    /// Encodes the option's data, as a client sends it.
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

/// The set of contexts that one option asks for. The time to match a context does not depend on the
/// number of queries.
#[derive(Debug, Clone, Default)]
pub struct ContextQueries<'a> {
    /// Queries that match the context of exactly that name.
    names: HashSet<&'a [u8]>,
    /// Queries that end with a colon, if these match all contexts with that prefix.
    prefixes: HashSet<&'a [u8]>,
    matches_all: bool,
}

/// Error for an option with more than [`MAX_QUERIES`] distinct queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("limit of {MAX_QUERIES} different queries per option exceeded")]
pub struct TooManyQueries;

impl<'a> ContextQueries<'a> {
    /// Creates the queries of LIST. A query matches a context by its name, or by a prefix of it
    /// that ends with a colon, such as `base:` or `qemu:dirty-bitmap:`. "If zero queries are sent,
    /// then the server MUST return all the metadata contexts".
    ///
    /// # Errors
    /// There are more than [`MAX_QUERIES`] distinct queries.
    pub fn for_list(queries: &[&'a [u8]]) -> Result<Self, TooManyQueries> {
        let mut all = Self::for_set(queries)?;
        all.prefixes = all.names.iter().copied().filter(|it| it.ends_with(b":")).collect();
        all.matches_all = queries.is_empty();
        Ok(all)
    }

    /// Creates the queries of SET. A query matches a context only by its full name ("the empty
    /// leaf-name … SHOULD NOT select any contexts").
    ///
    /// # Errors
    /// There are more than [`MAX_QUERIES`] distinct queries.
    pub fn for_set(queries: &[&'a [u8]]) -> Result<Self, TooManyQueries> {
        let mut names = HashSet::new();
        for query in queries {
            if names.insert(*query) && names.len() > MAX_QUERIES {
                return Err(TooManyQueries);
            }
        }
        Ok(Self { names, ..Self::default() })
    }

    /// Returns true if a query matches the context `name`.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.as_bytes();
        let has_prefix = || {
            let ends = name.iter().enumerate().filter(|(_, byte)| **byte == b':');
            ends.filter_map(|(end, _)| name.get(..=end)).any(|it| self.prefixes.contains(it))
        };
        self.matches_all || self.names.contains(name) || (!self.prefixes.is_empty() && has_prefix())
    }

    /// Returns the distinct queries if each of them matches only the context of that exact name.
    /// Returns `None` if other contexts could match.
    pub fn exact_names(&self) -> Option<impl Iterator<Item = &'a [u8]>> {
        let is_exact = self.prefixes.is_empty() && !self.matches_all;
        is_exact.then(|| self.names.iter().copied())
    }
}

/// Encodes the data of `NBD_REP_META_CONTEXT`.
pub fn encode_meta_context_data(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(truncate_string(name).as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_request_round_trip() {
        let data = b"\0\0\0\x01x\0\0\0\x02\0\0\0\x05base:\0\0\0\x03a:b";
        let request = MetaRequest::decode(data).unwrap();
        assert_eq!(request.name, b"x");
        assert_eq!(request.queries, [&b"base:"[..], b"a:b"]);
        assert_eq!(request.encode(), data);
    }

    // Seen in qemu-nbd: leftover bytes, and counts and lengths beyond the end of the data.
    #[test]
    fn wrong_lengths_are_rejected() {
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
        let listing = |query: &'static str| ContextQueries::for_list(&[query.as_bytes()]).unwrap();
        let selecting = |query: &'static str| ContextQueries::for_set(&[query.as_bytes()]).unwrap();
        for query in ["qemu:", "qemu:dirty-bitmap:", name] {
            assert!(listing(query).matches(name), "{query}");
            assert_eq!(selecting(query).matches(name), query == name, "{query}");
        }
        for query in ["qemu:dirty", "base:", "", "qemu:dirty-bitmap:ab", "qemu:dirty-bitmap"] {
            assert!(!listing(query).matches(name), "{query}");
            assert!(!selecting(query).matches(name), "{query}");
        }
    }

    #[test]
    fn empty_query_list_lists_all_and_selects_none() {
        let [listing, selecting] =
            [ContextQueries::for_list(&[]), ContextQueries::for_set(&[])].map(Result::unwrap);
        assert!(listing.matches("base:allocation") && listing.exact_names().is_none());
        assert!(!selecting.matches("base:allocation"));
        assert_eq!(selecting.exact_names().unwrap().count(), 0);
    }

    #[test]
    fn distinct_queries_are_limited_and_duplicates_counted_once() {
        let names: Vec<String> = (0..=MAX_QUERIES).map(|number| format!("x:{number}")).collect();
        let names: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
        assert!(ContextQueries::for_list(&names).is_err());
        assert!(ContextQueries::for_set(&names).is_err());
        let equal = vec![&b"a:"[..]; 10 * MAX_QUERIES];
        let most = [&names[1..], &equal[..]].concat();
        assert!(ContextQueries::for_set(&most).is_err());
        let queries = ContextQueries::for_set(&[&names[2..], &equal[..]].concat()).unwrap();
        assert_eq!(queries.exact_names().unwrap().count(), MAX_QUERIES);
    }
}
