//! Escapes untrusted text: names of archives, exports and interfaces, paths, certificates,
//! messages of peers.
//!
//! Such text may contain line breaks, terminal escape sequences, bidirectional controls and
//! invisible characters. Everything that shows it to people (log lines, errors, reports of the
//! commands, the service manager's status) writes it through this module, so that nobody can
//! forge a line or disguise a name. [`name`] is for a single name or path, [`text`] for a
//! sentence that may repeat untrusted text, [`json`] for JSON.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;

/// A name or a path, escaped for display.
///
/// [`Display`](fmt::Display) writes it without quotation marks, [`Debug`](fmt::Debug) with them,
/// escaping those inside. Hidden characters become `\n`, `\u{202e}` and the like, backslashes
/// `\\`, and bytes that aren't UTF-8 `\xff`, so that different names never look the same.
#[derive(Clone, Copy)]
pub struct Escaped<'a>(&'a [u8]);

/// Returns the escaped form of a name or a path.
pub fn name<T: AsRef<OsStr> + ?Sized>(name: &T) -> Escaped<'_> {
    Escaped(name.as_ref().as_bytes())
}

/// Returns the escaped form of a name in bytes.
pub fn bytes(name: &[u8]) -> Escaped<'_> {
    Escaped(name)
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
        for chunk in self.0.utf8_chunks() {
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
