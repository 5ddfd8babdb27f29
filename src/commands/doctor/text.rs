//! Renders a report as text for people.

use std::fmt::Write as _;

use super::report::{Outcome, Report, Step};
use crate::commands::output::format_seconds;

pub(super) fn render(report: &Report) -> String {
    let mut page = format!("{}\n\n", report.target);
    for step in &report.steps {
        push_step(&mut page, step);
    }
    page.push('\n');
    page.push_str(match report.outcome() {
        Outcome::Good => "Everything works.\n",
        Outcome::Warning => "It works, with warnings (marked !).\n",
        Outcome::Bad => "It doesn't work; the problems are marked ✗.\n",
    });
    page
}

fn push_step(page: &mut String, step: &Step) {
    let mark = match step.outcome {
        Outcome::Good => '✓',
        Outcome::Warning => '!',
        Outcome::Bad => '✗',
    };
    let took = step
        .took
        .map(|took| format!(" ({})", format_seconds(took.as_secs_f64())))
        .unwrap_or_default();
    let labels = match step.reasons.join(", ") {
        none if none.is_empty() => none,
        labels => format!(" [{labels}]"),
    };
    // Writing to a string can't fail.
    let _infallible = writeln!(page, "{mark} {}: {}{labels}{took}", step.name, step.found);
    for line in &step.lines {
        let _infallible = writeln!(page, "    {line}");
    }
    for advice in &step.advice {
        let _infallible = writeln!(page, "    -> {}: {}", advice.side, advice.text);
    }
}
