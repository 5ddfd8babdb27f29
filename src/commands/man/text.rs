//! Parses the plain text of `--help` and of the files in `words/`.
//!
//! A line in capitals is a heading. Text that is indented by two spaces is a paragraph, or, with
//! two spaces after its first words, an entry of a list. Text that is indented further is an
//! example, which is shown verbatim. Text without a heading isn't indented.

/// A heading and the blocks under it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Section {
    /// Heading; empty for text before the first one.
    pub(super) heading: String,
    pub(super) blocks: Vec<Block>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Block {
    Paragraph(String),
    Entry {
        tag: String,
        text: String,
    },
    /// Lines of an example, without their common indentation.
    Example(Vec<String>),
}

/// Minimum indentation of an example, in spaces.
const EXAMPLE_INDENT: usize = 4;

pub(super) fn parse(text: &str) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut current = Section { heading: String::new(), blocks: Vec::new() };
    // True if the next line may continue the block before it.
    let mut continues = false;
    for line in text.lines().map(str::trim_end) {
        if is_heading(line) {
            sections.push(current);
            current = Section { heading: line.to_owned(), blocks: Vec::new() };
        } else if !line.is_empty() {
            add(&mut current.blocks, line, continues);
        } else if let Some(Block::Example(lines)) = current.blocks.last_mut() {
            // An empty line belongs to the example if the example continues after it.
            lines.push(String::new());
        }
        continues = !line.is_empty() && !is_heading(line);
    }
    sections.push(current);
    sections.retain(|section| !section.heading.is_empty() || !section.blocks.is_empty());
    let blocks = sections.iter_mut().flat_map(|section| &mut section.blocks);
    blocks.for_each(Block::tidy);
    sections
}

/// Adds a line to the last block, or starts a new block with it.
fn add(blocks: &mut Vec<Block>, line: &str, continues: bool) {
    let content = line.trim_start();
    let indent = line.len() - content.len();
    let entry = content.split_once("  ").filter(|_| indent > 0 && indent < EXAMPLE_INDENT);
    match (blocks.last_mut(), entry) {
        (_, Some((tag, text))) => {
            blocks.push(Block::Entry { tag: tag.to_owned(), text: text.trim_start().to_owned() });
        }
        (Some(Block::Entry { text, .. }), None) if continues && indent >= EXAMPLE_INDENT => {
            append(text, content);
        }
        (Some(Block::Example(lines)), None) if indent >= EXAMPLE_INDENT => {
            lines.push(line.to_owned());
        }
        (_, None) if indent >= EXAMPLE_INDENT => blocks.push(Block::Example(vec![line.to_owned()])),
        (Some(Block::Paragraph(text)), None) if continues => append(text, content),
        (_, None) => blocks.push(Block::Paragraph(content.to_owned())),
    }
}

fn append(text: &mut String, more: &str) {
    text.push(' ');
    text.push_str(more);
}

fn is_heading(line: &str) -> bool {
    line.starts_with(|first: char| first.is_ascii_uppercase())
        && line.chars().all(|it| it.is_ascii_uppercase() || it == ' ')
}

impl Block {
    /// Removes the common indentation and the trailing empty lines of an example.
    fn tidy(&mut self) {
        let Self::Example(lines) = self else { return };
        while lines.pop_if(|last| last.is_empty()).is_some() {}
        let indent = |line: &String| line.len() - line.trim_start().len();
        let written = lines.iter().filter(|line| !line.is_empty());
        let shared = written.map(indent).min().unwrap_or(0);
        for line in lines {
            *line = line.split_off(shared.min(line.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_paragraphs_entries_and_examples_are_parsed() {
        let sections = parse(
            "Before it,\nin two lines.\n\nAnd more.\n\nEXIT CODES\n  0    fine\n  130  \
             interrupted; it is\n       not all\n  Those of others: there.\n\nEXAMPLES\n  \
             Serve:\n    hexz-nbd \\\n        snap.hexz\n\n    again\n\n  Look:\n    nbdinfo",
        );
        let paragraph = |text: &str| Block::Paragraph(text.to_owned());
        let entry = |tag: &str, text: &str| Block::Entry { tag: tag.into(), text: text.into() };
        let example =
            |lines: &[&str]| Block::Example(lines.iter().map(|line| (*line).to_owned()).collect());
        let section = |heading: &str, blocks| Section { heading: heading.to_owned(), blocks };
        assert_eq!(
            sections,
            [
                section("", vec![paragraph("Before it, in two lines."), paragraph("And more.")]),
                section(
                    "EXIT CODES",
                    vec![
                        entry("0", "fine"),
                        entry("130", "interrupted; it is not all"),
                        paragraph("Those of others: there.")
                    ]
                ),
                section(
                    "EXAMPLES",
                    vec![
                        paragraph("Serve:"),
                        example(&["hexz-nbd \\", "    snap.hexz", "", "again"]),
                        paragraph("Look:"),
                        example(&["nbdinfo"]),
                    ]
                ),
            ]
        );
    }

    #[test]
    fn empty_text_has_no_sections() {
        assert_eq!(parse(""), []);
    }
}
