//! Escapes untrusted text: names of archives, exports and interfaces, paths, certificates,
//! messages of peers.
//!
//! Such text may contain line breaks, terminal escape sequences, bidirectional controls and
//! invisible characters. Everything that shows it to people (log lines, errors, reports of the
//! commands, the service manager's status) writes it through this module, so that nobody can
//! forge a line or disguise a name. [`name`] is for a single name, [`path`] for a path or URL from the
//! operator, [`text`] for a sentence that may repeat untrusted text, [`json`] for JSON.
//!
//! The query of a URL may be as good as a password, such as a signature; [`path`] and
//! [`without_secrets`] leave it out.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;

/// Characters between which a sentence quotes something.
const QUOTES: [char; 3] = ['"', '\'', '`'];

/// A name or a path, escaped for display.
///
/// [`Display`](fmt::Display) writes it without quotation marks, [`Debug`](fmt::Debug) with them,
/// escaping those inside. Hidden characters become `\n`, `\u{202e}` and the like, backslashes
/// `\\`, and bytes that aren't UTF-8 `\xff`, so that different names never look the same.
#[derive(Clone, Copy)]
pub struct Escaped<'a>([&'a [u8]; 2]);

/// Returns the escaped form of a name.
pub fn name<T: AsRef<OsStr> + ?Sized>(name: &T) -> Escaped<'_> {
    bytes(name.as_ref().as_bytes())
}

/// Returns the escaped form of a name in bytes.
pub fn bytes(name: &[u8]) -> Escaped<'_> {
    Escaped([name, b""])
}

/// Returns the escaped form of a path or URL from the operator. Of anything that looks like a URL,
/// also with an unknown scheme or behind `NAME=`, user, password and query are left out.
pub fn path<T: AsRef<OsStr> + ?Sized>(path: &T) -> Escaped<'_> {
    let path = path.as_ref().as_bytes();
    Escaped(UrlParts::of(path).map_or([path, b""], |url| url.shown()))
}

/// Returns a sentence without the users, passwords and queries of the URLs in it.
pub fn without_secrets(text: &str) -> Cow<'_, str> {
    let mut shown = String::new();
    let mut rest = text;
    let mut has_secrets = false;
    while let Some(at) = rest.find(":/") {
        let (word, after) = rest.split_at(end_of_url(rest, at));
        match UrlParts::of(word.as_bytes()) {
            // A question mark at the end is that of the sentence.
            Some(url) if url.has_secrets() && url.query != b"?" => {
                has_secrets = true;
                // The parts end at ASCII characters.
                shown.extend(url.shown().iter().filter_map(|part| str::from_utf8(part).ok()));
            }
            _ => shown.push_str(word),
        }
        rest = after;
    }
    if !has_secrets {
        return Cow::Borrowed(text);
    }
    shown.push_str(rest);
    Cow::Owned(shown)
}

/// Returns the end of the URL in a sentence whose scheme ends at `colon`: the quotation mark that
/// corresponds to the one in front of it, or else the next quotation mark or space.
fn end_of_url(sentence: &str, colon: usize) -> usize {
    let (before, behind) = sentence.split_at(colon);
    let ends = |character: char| character.is_whitespace() || QUOTES.contains(&character);
    let opening = before.chars().rev().find(|character| ends(*character));
    let closing = opening.filter(|opening| QUOTES.contains(opening));
    let end = closing.and_then(|quote| behind.find(quote)).or_else(|| behind.find(ends));
    end.map_or(sentence.len(), |end| colon + end)
}

/// Parts of a text with a URL.
struct UrlParts<'a> {
    /// Everything up to the slashes behind the scheme.
    start: &'a [u8],
    /// User and password, with `@`.
    user: &'a [u8],
    /// Host and path.
    place: &'a [u8],
    /// The query, from the question mark on.
    query: &'a [u8],
}

impl<'a> UrlParts<'a> {
    /// Splits a text with a URL up to its end. Paths that were joined or normalized have one slash
    /// behind the scheme.
    fn of(text: &'a [u8]) -> Option<Self> {
        let is_scheme = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
        let colon = text.windows(2).enumerate().find_map(|(at, window)| {
            let scheme = text.get(..at)?.iter().rev().take_while(|byte| is_scheme(byte));
            // One letter is a drive of another system.
            (window == b":/" && scheme.count() > 1).then_some(at)
        })?;
        let slashes = text.iter().skip(colon + 1).take_while(|byte| **byte == b'/').count();
        let (start, rest) = text.split_at_checked(colon + 1 + slashes)?;
        let authority = rest.split(|byte| *byte == b'/').next().unwrap_or_default();
        let user = authority.iter().rposition(|byte| *byte == b'@').map_or(0, |at| at + 1);
        let is_ambiguous = user > 0 && authority.contains(&b'?');
        let (user, rest) = rest.split_at_checked(if is_ambiguous { 0 } else { user })?;
        let query = rest.iter().position(|byte| *byte == b'?').unwrap_or(rest.len());
        // A password with a question mark, or a query with an @.
        let query = if is_ambiguous { 0 } else { query };
        let (place, query) = rest.split_at_checked(query)?;
        Some(Self { start, user, place, query })
    }

    fn has_secrets(&self) -> bool {
        !self.user.is_empty() || !self.query.is_empty()
    }

    fn shown(&self) -> [&'a [u8]; 2] {
        [self.start, self.place]
    }
}

/// Escapes the hidden characters of a sentence, so that it is on one line. Backslashes are kept,
/// since names in it may have been escaped already.
pub fn text(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut line = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match is_hidden(character) {
            true => push_escape(&mut line, character),
            false => line.push(character),
        }
    }
    Cow::Owned(line)
}

/// Escapes hidden characters inside the strings of a JSON text, such as `\u202e`. Line breaks are
/// kept: JSON has them only between its members.
pub fn json(json: &str) -> Cow<'_, str> {
    let is_escaped = |character: char| character != '\n' && is_hidden(character);
    if !json.contains(is_escaped) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        if is_escaped(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a string doesn't fail.
                write!(safe, "\\u{unit:04x}").unwrap_or_default();
            }
        } else {
            safe.push(character);
        }
    }
    Cow::Owned(safe)
}

/// Returns a name or a path for a JSON string: unchanged if it is UTF-8, otherwise escaped like
/// [`name`], since replacement characters would make different names equal.
pub fn unicode<T: AsRef<OsStr> + ?Sized>(name: &T) -> Cow<'_, str> {
    match name.as_ref().to_str() {
        Some(text) => Cow::Borrowed(text),
        None => Cow::Owned(self::name(name).to_string()),
    }
}

/// Appends the escape sequence of `character`: `\n`, `\u{1b}`.
pub fn push_escape(out: &mut String, character: char) {
    match character {
        '\0' | '\t' | '\n' | '\r' => out.extend(character.escape_debug()),
        other => out.extend(other.escape_unicode()),
    }
}

/// Returns true if `character` isn't visible as itself: control characters, line and paragraph
/// separators, bidirectional controls, unusual spaces, zero-width characters, blank letters and
/// unassigned code points.
pub fn is_hidden(character: char) -> bool {
    match character {
        ' '..='~' => false,
        // Letters and marks by category, but blank; and variation selectors.
        '\u{34f}'
        | '\u{115f}'
        | '\u{1160}'
        | '\u{17b4}'
        | '\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{2800}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{ffa0}'
        | '\u{e0100}'..='\u{e01ef}' => true,
        other => {
            // The standard library knows which characters are printable. It escapes a combining
            // mark only if no letter precedes it.
            let mut pair = String::from("a");
            pair.push(other);
            pair.escape_debug().count() > 2
        }
    }
}

impl Escaped<'_> {
    fn write(&self, f: &mut fmt::Formatter<'_>, is_quoted: bool) -> fmt::Result {
        for chunk in self.0.iter().flat_map(|part| part.utf8_chunks()) {
            for character in chunk.valid().chars() {
                match character {
                    '\\' => f.write_str("\\\\")?,
                    '"' if is_quoted => f.write_str("\\\"")?,
                    hidden if is_hidden(hidden) => {
                        let mut escape = String::new();
                        push_escape(&mut escape, hidden);
                        f.write_str(&escape)?;
                    }
                    visible => f.write_char(visible)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, false)
    }
}

impl fmt::Debug for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        self.write(f, true)?;
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// One of each kind: C0 and C1 controls, separators, bidirectional controls, zero-width
    /// characters, fillers, variation selectors, tags, private use, unassigned, unusual spaces.
    const HIDDEN: &str = "\0\n\r\t\u{1b}\u{7f}\u{85}\u{9b}\u{a0}\u{ad}\u{34f}\u{61c}\u{115f}\
        \u{180e}\u{200b}\u{200d}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2060}\u{2066}\
        \u{2069}\u{206f}\u{2800}\u{3000}\u{3164}\u{e000}\u{fe0f}\u{feff}\u{fff9}\u{ffa0}\
        \u{e0001}\u{e0020}\u{e0100}\u{10ffff}";

    #[test]
    fn hidden_characters_are_escaped_everywhere() {
        for character in HIDDEN.chars() {
            assert!(is_hidden(character), "{character:?}");
            let foreign = format!("a{character}b");
            for shown in [
                name(&foreign).to_string(),
                format!("{:?}", name(&foreign)),
                text(&foreign).into_owned(),
            ] {
                assert!(!shown.chars().any(is_hidden), "{shown:?}");
                assert!(shown.contains("a\\") && shown.contains('b'), "{shown}");
            }
            let safe = json(&serde_json::to_string(&foreign).unwrap()).into_owned();
            assert!(!safe.chars().any(is_hidden), "{safe:?}");
            assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), foreign);
        }
    }

    #[test]
    fn what_can_be_seen_stays() {
        let seen = "Büro \"2\" it's 北京 हिन्दी e\u{301} ☃ 👍 €…";
        assert_eq!(name(seen).to_string(), seen);
        assert_eq!(text(seen), seen);
        assert_eq!(json(seen), seen);
        assert_eq!(format!("{:?}", name("say \"x\"")), r#""say \"x\"""#);
    }

    #[test]
    fn secrets_of_urls_are_not_shown() {
        for (given, shown) in [
            ("https://h/a.hxz?X-Amz-Signature=s3cret", "https://h/a.hxz"),
            ("web=HTTPS://h/a.hxz?s3cret/b.hxz.trace", "web=HTTPS://h/a.hxz"),
            ("/srv/gcs:/b/k?s3cret", "/srv/gcs:/b/k"),
            ("s3:/b/k?s3cret", "s3:/b/k"),
            ("https://u:s3cret@h/a", "https://h/a"),
            ("https://u:s3?cret@h/a?s3cret", "https://"),
            ("https://h?a@s3cret", "https://"),
            ("https://h?s3cret", "https://h"),
            ("x yz://h/a b?s3cret 'c'", "x yz://h/a b"),
            ("s3://golden/a@b.hxz", "s3://golden/a@b.hxz"),
            ("/srv/what?.hxz", "/srv/what?.hxz"),
            ("web=what?.hxz", "web=what?.hxz"),
            ("C:/what?", "C:/what?"),
        ] {
            assert_eq!(path(given).to_string(), shown);
            assert_eq!(format!("{:?}", path(given)), format!("{shown:?}"));
        }
        assert_eq!(path(OsStr::from_bytes(b"ab:/\xff?s3cret")).to_string(), r"ab:/\xff");
    }

    #[test]
    fn sentences_lose_the_secrets_of_their_urls() {
        for (given, shown) in [
            ("invalid value 'http://h/v7/?s3cret' for X", "invalid value 'http://h/v7/' for X"),
            ("a \"b=s3://h/ü?s3cret\", http://u:s3cret@h/?x y", "a \"b=s3://h/ü\", http://h/ y"),
            ("string \"a=gcs://b/?s3'cret s3cret\", or", "string \"a=gcs://b/\", or"),
            ("did you mean s3://b/k?", "did you mean s3://b/k?"),
            ("what? http://h/, nothing: /srv/x?y", "what? http://h/, nothing: /srv/x?y"),
            ("", ""),
        ] {
            assert_eq!(without_secrets(given), shown);
        }
    }

    #[test]
    fn different_names_never_look_the_same() {
        let shown = |bytes: &[u8]| self::bytes(bytes).to_string();
        assert_eq!(shown(b"a\n\x1b[2J\0"), r"a\n\u{1b}[2J\0");
        assert_eq!(shown(b"a\\n"), r"a\\n");
        assert_eq!(shown(b"\xff\xc3\xa4\xe2\x80"), r"\xffä\xe2\x80");
        assert_eq!(name(Path::new("\u{202e}zxh.a")).to_string(), r"\u{202e}zxh.a");
        assert_eq!(text("in \\n stays\n"), r"in \n stays\n");
        let odd = OsStr::from_bytes(b"/x/\xff.hxz");
        assert_eq!((unicode(odd).as_ref(), unicode("a\nb").as_ref()), (r"/x/\xff.hxz", "a\nb"));
        assert_eq!(json("{\n  \"a\": \"\u{e0001}\"\n}"), "{\n  \"a\": \"\\udb40\\udc01\"\n}");
    }
}
