//! The page of a command.

use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use super::page::{Page, usage, words};
use super::text::{self, Section};

/// What is called otherwise in manual pages than in --help.
const RENAMED: &[(&str, &str)] = &[("EXIT CODES", "EXIT STATUS"), ("EXAMPLE", "EXAMPLES")];

/// What comes last, in this order, as readers of manual pages expect it.
const LAST: &[&str] = &["EXIT STATUS", "SIGNALS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"];

/// Where the commands of a command are described.
pub(super) enum Commands {
    /// On pages of their own.
    Elsewhere,
    /// On its page.
    Here,
}

/// The page of `command`, which has to have been built, with `more` than --help says.
pub(super) fn page(command: &Command, name: &str, commands: &Commands, more: &str) -> Page {
    let mut page = Page::new(name, "1", "User Commands", &about(command));
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
        command.get_subcommands().filter(|it| is_page(it)).for_each(|it| match commands {
            Commands::Elsewhere => elsewhere(&mut page, name, it),
            Commands::Here => here(&mut page, it),
        });
    }
    sections.iter().for_each(|section| page.section(section));
    page
}

/// Whether a command is one to be described.
pub(super) fn is_page(command: &Command) -> bool {
    !command.is_hide_set() && command.get_name() != "help"
}

/// What a command does, in a line.
pub(super) fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    about.trim_end_matches('.').to_owned()
}

fn synopsis(page: &mut Page, command: &Command) {
    let said = command.clone().render_usage().to_string();
    for line in said.trim_start_matches("Usage:").lines() {
        page.paragraph(usage(line.trim()));
    }
}

/// All that is said about what a command does.
fn describe(page: &mut Page, command: &Command) {
    let short = command.get_about().map(ToString::to_string).unwrap_or_default();
    let long = command.get_long_about().map(ToString::to_string).unwrap_or_default();
    let more = long.strip_prefix(&short).unwrap_or(&long);
    let more = more.trim_start_matches(['.', '\n']);
    let said = if more.is_empty() { &short } else { more };
    text::parse(said).iter().for_each(|section| page.blocks(&section.blocks));
}

/// What is said behind the options, in the order of a manual page.
fn sections(command: &Command, more: &str) -> Vec<Section> {
    let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let mut sections = text::parse(&help);
    sections.extend(text::parse(more));
    for section in &mut sections {
        if let Some((_, name)) = RENAMED.iter().find(|(name, _)| *name == section.heading) {
            (*name).clone_into(&mut section.heading);
        }
    }
    sections.sort_by_key(|section| LAST.iter().position(|name| *name == section.heading));
    sections
}

/// A command that has a page of its own.
fn elsewhere(page: &mut Page, program: &str, command: &Command) {
    let name = vec![bold(format!("{program}-{}", command.get_name())), roman("(1)")];
    page.entry(name, &words(&about(command)));
}

/// A command within another one's page.
fn here(page: &mut Page, command: &Command) {
    page.subheading(command.get_name());
    synopsis(page, command);
    describe(page, command);
    // The others are those of the command that it belongs to.
    command
        .get_arguments()
        .filter(|it| is_shown(it) && !it.is_global_set() && it.get_id() != "help")
        .for_each(|it| argument(page, names(it), it));
}

/// Positional arguments and options, in the order of --help.
fn arguments(page: &mut Page, command: &Command) {
    let shown = command.get_arguments().filter(|it| is_shown(it));
    let (positional, options): (Vec<_>, Vec<_>) = shown.partition(|it| it.is_positional());
    let all: Vec<_> = positional.into_iter().chain(options).collect();
    grouped(page, &all, names);
}

/// Arguments under their headings, each with its tag.
pub(super) fn grouped(page: &mut Page, all: &[&Arg], tag: impl Fn(&Arg) -> Vec<Inline>) {
    // Those without a heading come first.
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

/// An entry with what --help says of an argument.
fn argument(page: &mut Page, tag: Vec<Inline>, argument: &Arg) {
    let help = argument.get_long_help().or(argument.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let (values, explained) = values(argument);
    let mut paragraphs = help.split("\n\n");
    let mut first = words(paragraphs.next().unwrap_or_default());
    if !explained && !values.is_empty() {
        let names: Vec<_> = values.iter().map(|(name, _)| name.as_str()).collect();
        first.push(roman(format!(" [possible values: {}]", names.join(", "))));
    }
    if let Some(default) = default(argument) {
        first.push(roman(format!(" [default: {default}]")));
    }
    page.entry(tag, &first);
    paragraphs.for_each(|paragraph| page.further(&words(paragraph)));
    if explained {
        page.inside(|page| {
            for (name, help) in values {
                page.entry(vec![bold(name)], &words(&help));
            }
        });
    }
}

/// How an argument is given.
fn names(argument: &Arg) -> Vec<Inline> {
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

/// What stands for an argument's value.
pub(super) fn value_name(argument: &Arg) -> String {
    let names = argument.get_value_names().unwrap_or_default();
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// What an argument is if it isn't given.
fn default(argument: &Arg) -> Option<String> {
    let defaults = argument.get_default_values();
    if defaults.is_empty() || !takes_values(argument) || argument.is_hide_default_value_set() {
        return None;
    }
    let texts: Vec<_> = defaults.iter().map(|it| it.to_string_lossy()).collect();
    Some(texts.join(", "))
}

/// The values that an argument can have, if they can be told, and whether one is explained.
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
