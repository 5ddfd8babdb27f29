//! Writes a manual page in roff: sections, paragraphs, entries and examples.

use roff::{Inline, Roff, bold, italic, roman};

use super::text::{Block, Section};

/// Date of the last change to the pages' contents, beyond wording. It isn't the build date, so that
/// builds are reproducible.
const DATE: &str = "2026-11-25";

pub(super) struct ManualPage {
    roff: Roff,
    /// True directly after a heading, where a paragraph needs no separator.
    is_after_heading: bool,
}

impl ManualPage {
    /// Creates a page of this name in a section of the manual.
    pub(super) fn new(name: &str, section: &str, manual: &str, about: &str) -> Self {
        let mut page = Self { roff: Roff::new(), is_after_heading: true };
        let source = concat!("hexz-nbd ", env!("CARGO_PKG_VERSION"));
        page.roff.control("TH", [&name.to_uppercase(), section, DATE, source, manual]);
        // No hyphenation and no justification, so that options and paths stay intact. HY is the
        // hyphenation mode that groff restores after an example.
        page.roff.control("nr", ["HY", "0"]).control("nh", []).control("ad", ["l"]);
        page.heading("NAME");
        page.roff.text([roman(format!("{name} - {about}"))]);
        page
    }

    /// Returns the source in pure ASCII, because not every system's roff knows UTF-8.
    pub(super) fn render(&self) -> String {
        let mut source = String::new();
        for character in self.roff.render().chars() {
            if character.is_ascii() {
                source.push(character);
            } else {
                source.push_str(&format!("\\[u{:04X}]", u32::from(character)));
            }
        }
        source
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.roff.control("SH", [text]);
        self.is_after_heading = true;
    }

    pub(super) fn subheading(&mut self, text: &str) {
        self.roff.control("SS", [text]);
        self.is_after_heading = true;
    }

    /// Writes a heading and its blocks.
    pub(super) fn section(&mut self, section: &Section) {
        self.heading(&section.heading);
        self.blocks(&section.blocks);
    }

    pub(super) fn blocks(&mut self, blocks: &[Block]) {
        for block in blocks {
            match block {
                Block::Paragraph(text) => self.paragraph(with_bold_options(text)),
                Block::Entry { tag, text } => self.entry(vec![bold(tag)], &with_bold_options(text)),
                Block::Example(lines) => self.example(lines),
            }
        }
    }

    pub(super) fn paragraph(&mut self, text: Vec<Inline>) {
        if !self.is_after_heading {
            self.roff.control("PP", []);
        }
        self.roff.text(text);
        self.is_after_heading = false;
    }

    /// Writes a tag with its explanation beside it.
    pub(super) fn entry(&mut self, tag: Vec<Inline>, text: &[Inline]) {
        self.roff.control("TP", []).text(tag).text(text);
        self.is_after_heading = false;
    }

    /// Writes a further paragraph of the previous entry.
    pub(super) fn continue_entry(&mut self, text: &[Inline]) {
        self.roff.control("IP", []).text(text);
    }

    /// Writes a nested list that belongs to the previous entry.
    pub(super) fn nested(&mut self, list: impl FnOnce(&mut Self)) {
        self.roff.control("RS", []);
        list(self);
        self.roff.control("RE", []);
    }

    /// Writes lines verbatim.
    fn example(&mut self, lines: &[String]) {
        if !self.is_after_heading {
            self.roff.control("PP", []);
        }
        self.roff.control("RS", ["4"]).control("EX", []);
        for line in lines {
            self.roff.text([roman(line)]);
        }
        self.roff.control("EE", []).control("RE", []);
        self.is_after_heading = false;
    }
}

/// Formats text, with options in bold.
pub(super) fn with_bold_options(text: &str) -> Vec<Inline> {
    let mut inlines = Vec::new();
    let mut plain = String::new();
    for (position, word) in text.split(' ').enumerate() {
        if position > 0 {
            plain.push(' ');
        }
        let (before, option, after) = split_at_option(word);
        plain.push_str(before);
        if !option.is_empty() {
            inlines.push(roman(std::mem::take(&mut plain)));
            inlines.push(bold(option));
        }
        plain.push_str(after);
    }
    inlines.push(roman(plain));
    inlines
}

/// Formats a usage line, with placeholders in italics.
pub(super) fn usage(text: &str) -> Vec<Inline> {
    let mut inlines = Vec::new();
    for (position, word) in text.split(' ').enumerate() {
        if position > 0 {
            inlines.push(roman(" "));
        }
        let name = word.trim_matches(['<', '>', '[', ']', '.']);
        let written = word.starts_with('-') || word.starts_with(|it: char| it.is_lowercase());
        match word.strip_prefix('<').and_then(|word| word.split_once('>')) {
            Some((name, rest)) => inlines.extend([italic(name), roman(rest)]),
            None if written => inlines.push(bold(word)),
            None if name.is_empty() => inlines.push(roman(word)),
            None => inlines.push(italic(word)),
        }
    }
    inlines
}

/// Splits a word into the text before an option, the option, and the text after it. The option is
/// empty if there is none.
fn split_at_option(word: &str) -> (&str, &str, &str) {
    let Some((before, rest)) = word.find("--").and_then(|at| word.split_at_checked(at)) else {
        return (word, "", "");
    };
    let belongs = |it: char| it.is_ascii_alphanumeric() || it == '-';
    let end = rest.find(|it| !belongs(it)).unwrap_or(rest.len());
    match rest.split_at_checked(end) {
        Some((option, after))
            if option.len() > 2 && before.chars().all(|it| "\"(".contains(it)) =>
        {
            (before, option, after)
        }
        _ => (word, "", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_in_text_are_bold() {
        let expected = [
            roman("as ("),
            bold("--allow"),
            roman(") or "),
            bold("--rules"),
            roman(" say, a--b -- not"),
        ];
        assert_eq!(with_bold_options("as (--allow) or --rules say, a--b -- not"), expected);
    }

    #[test]
    fn placeholders_in_usage_are_italic() {
        let expected = [
            bold("hexz-nbd"),
            roman(" "),
            italic("[OPTIONS]"),
            roman(" "),
            bold("--from"),
            roman(" "),
            italic("ADDRESS"),
            roman(""),
        ];
        assert_eq!(usage("hexz-nbd [OPTIONS] --from <ADDRESS>"), expected);
    }

    #[test]
    fn non_ascii_characters_are_escaped() {
        let mut page = ManualPage::new("x", "1", "Some Manual", "does it");
        page.paragraph(with_bold_options("uri:… and a \\ and\n.SH no heading"));
        let source = page.render();
        assert!(source.contains("uri:\\[u2026] and a \\\\ and\n\\&.SH no heading"), "{source}");
    }
}
