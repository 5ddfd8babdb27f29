//! Builds the manual page of a command.

use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use super::page::{ManualPage, usage, with_bold_options};
use super::text::{self, Section};

/// Headings that differ between `--help` and manual pages: the former, and the latter.
const RENAMED_HEADINGS: &[(&str, &str)] = &[("EXAMPLE", "EXAMPLES")];

/// Sections that come last, in this order, as is usual for manual pages.
const TRAILING_SECTIONS: &[&str] =
    &["EXIT STATUS", "SIGNALS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"];

/// Place where the subcommands of a command are described.
pub(super) enum SubcommandPlacement {
    /// On pages of their own.
    OwnPages,
    /// On the page of the command.
    SamePage,
}

/// Builds the page of `command`, with the text `more` in addition to that of `--help`. The command
/// has to have been built.
pub(super) fn page(
    command: &Command,
    name: &str,
    commands: &SubcommandPlacement,
    more: &str,
) -> ManualPage {
    let mut page = ManualPage::new(name, "1", "User Commands", &about(command));
    page.heading("SYNOPSIS");
    synopsis(&mut page, command);
    let mut sections = sections(command, more);
    page.heading("DESCRIPTION");
    describe(&mut page, command);
    for section in sections.extract_if(.., |section| section.heading.is_empty()) {
        page.blocks(&section.blocks);
    }
    if command.get_arguments().any(is_shown) {
        page.heading("OPTIONS");
        arguments(&mut page, command);
    }
    if command.has_subcommands() {
        page.heading("COMMANDS");
        command.get_subcommands().filter(|it| is_documented(it)).for_each(|it| match commands {
            SubcommandPlacement::OwnPages => refer_to_page(&mut page, name, it),
            SubcommandPlacement::SamePage => describe_subcommand(&mut page, it),
        });
    }
    sections.iter().for_each(|section| page.section(section));
    page
}

/// Returns true if a command is described: it is neither hidden nor `help`.
pub(super) fn is_documented(command: &Command) -> bool {
    !command.is_hide_set() && command.get_name() != "help"
}

/// Returns the one-line description of a command, without a period at its end.
pub(super) fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    about.trim_end_matches('.').to_owned()
}

fn synopsis(page: &mut ManualPage, command: &Command) {
    let usage_text = command.clone().render_usage().to_string();
    for line in usage_text.trim_start_matches("Usage:").lines() {
        page.paragraph(usage(line.trim()));
    }
}

/// Writes the description of a command.
fn describe(page: &mut ManualPage, command: &Command) {
    let short = command.get_about().map(ToString::to_string).unwrap_or_default();
    let long = command.get_long_about().map(ToString::to_string).unwrap_or_default();
    let more = long.strip_prefix(&short).unwrap_or(&long);
    let more = more.trim_start_matches(['.', '\n']);
    let description = if more.is_empty() { &short } else { more };
    text::parse(description).iter().for_each(|section| page.blocks(&section.blocks));
}

/// Returns the sections that follow the options, in the order of a manual page.
fn sections(command: &Command, more: &str) -> Vec<Section> {
    let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let mut sections = text::parse(&help);
    sections.extend(text::parse(more));
    for section in &mut sections {
        if let Some((_, name)) = RENAMED_HEADINGS.iter().find(|(name, _)| *name == section.heading)
        {
            (*name).clone_into(&mut section.heading);
        }
    }
    sections
        .sort_by_key(|section| TRAILING_SECTIONS.iter().position(|name| *name == section.heading));
    sections
}

/// Writes an entry for a subcommand that has a page of its own.
fn refer_to_page(page: &mut ManualPage, program: &str, command: &Command) {
    let name = vec![bold(format!("{program}-{}", command.get_name())), roman("(1)")];
    page.entry(name, &with_bold_options(&about(command)));
}

/// Describes a subcommand on the page of its command.
fn describe_subcommand(page: &mut ManualPage, command: &Command) {
    page.subheading(command.get_name());
    synopsis(page, command);
    describe(page, command);
    // The others belong to the command itself, which lists them.
    command
        .get_arguments()
        .filter(|it| is_shown(it) && !it.is_global_set() && it.get_id() != "help")
        .for_each(|it| argument(page, argument_tag(it), it));
}

/// Writes positional arguments and options, in the order of `--help`.
fn arguments(page: &mut ManualPage, command: &Command) {
    let shown = command.get_arguments().filter(|it| is_shown(it));
    let (positional, options): (Vec<_>, Vec<_>) = shown.partition(|it| it.is_positional());
    let all: Vec<_> = positional.into_iter().chain(options).collect();
    grouped(page, &all, argument_tag);
}

/// Writes arguments under their headings, each with its tag.
pub(super) fn grouped(page: &mut ManualPage, all: &[&Arg], tag: impl Fn(&Arg) -> Vec<Inline>) {
    // Arguments without a heading come first.
    let mut headings = vec![None];
    for argument in all {
        if !headings.contains(&argument.get_help_heading()) {
            headings.push(argument.get_help_heading());
        }
    }
    for heading in headings {
        if let Some(heading) = heading {
            page.subheading(heading);
        }
        let here = all.iter().filter(|it| it.get_help_heading() == heading);
        here.for_each(|it| argument(page, tag(it), it));
    }
}

/// Writes an entry with the text of `--help` for an argument.
fn argument(page: &mut ManualPage, tag: Vec<Inline>, argument: &Arg) {
    let help = argument.get_long_help().or(argument.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let (values, explained) = values(argument);
    let mut paragraphs = help.split("\n\n");
    let mut first = with_bold_options(paragraphs.next().unwrap_or_default());
    if !explained && !values.is_empty() {
        let names: Vec<_> = values.iter().map(|(name, _)| name.as_str()).collect();
        first.push(roman(format!(" [possible values: {}]", names.join(", "))));
    }
    if let Some(default) = default(argument) {
        first.push(roman(format!(" [default: {default}]")));
    }
    page.entry(tag, &first);
    paragraphs.for_each(|paragraph| page.continue_entry(&with_bold_options(paragraph)));
    if explained {
        page.nested(|page| {
            for (name, help) in values {
                page.entry(vec![bold(name)], &with_bold_options(&help));
            }
        });
    }
}

/// Formats the names of an argument, and the placeholder of its value.
fn argument_tag(argument: &Arg) -> Vec<Inline> {
    let mut tag = Vec::new();
    if let Some(short) = argument.get_short() {
        tag.push(bold(format!("-{short}")));
        tag.push(roman(", "));
    }
    if let Some(long) = argument.get_long() {
        tag.push(bold(format!("--{long}")));
    }
    if takes_values(argument) {
        if !argument.is_positional() {
            tag.push(roman(" "));
        }
        tag.push(italic(value_name(argument)));
        if argument.get_num_args().is_some_and(|number| number.max_values() > 1) {
            tag.push(roman("..."));
        }
    }
    tag
}

/// Returns the placeholder of an argument's value.
pub(super) fn value_name(argument: &Arg) -> String {
    let names = argument.get_value_names().unwrap_or_default();
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Returns the default of an argument, if there is one to show.
fn default(argument: &Arg) -> Option<String> {
    let defaults = argument.get_default_values();
    if defaults.is_empty() || !takes_values(argument) || argument.is_hide_default_value_set() {
        return None;
    }
    let texts: Vec<_> = defaults.iter().map(|it| it.to_string_lossy()).collect();
    Some(texts.join(", "))
}

/// Returns the possible values of an argument with their help texts, and true if any of them has
/// such a text.
fn values(argument: &Arg) -> (Vec<(String, String)>, bool) {
    if !takes_values(argument) || argument.is_hide_possible_values_set() {
        return (Vec::new(), false);
    }
    let values: Vec<_> = argument
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| {
            let help = value.get_help().map(ToString::to_string);
            (value.get_name().to_owned(), help.unwrap_or_default())
        })
        .collect();
    let explained = values.iter().any(|(_, help)| !help.is_empty());
    (values, explained)
}

fn takes_values(argument: &Arg) -> bool {
    argument.get_action().takes_values()
}

fn is_shown(argument: &Arg) -> bool {
    !argument.is_hide_set()
}
