//! Renders a report as text for people.

use std::fmt::Write as _;

use super::report::{Outcome, Report, Step, format_duration};

pub(super) fn render(report: &Report) -> String {
    let mut page = format!("{}\n\n", report.target);
    for step in &report.steps {
        push_step(&mut page, step);
    }
    page.push('\n');
    page.push_str(match report.outcome() {
        Outcome::Good => "All of it works.\n",
        Outcome::Warning => "It works; see what is marked with !.\n",
        Outcome::Bad => "It doesn't work; see what is marked with ✗.\n",
    });
    page
}

fn push_step(page: &mut String, step: &Step) {
    let mark = match step.outcome {
        Outcome::Good => '✓',
        Outcome::Warning => '!',
        Outcome::Bad => '✗',
    };
    let took = step.took.map(|took| format!(" ({})", format_duration(took))).unwrap_or_default();
    // Writing to a string can't fail.
    let _infallible = writeln!(page, "{mark} {}: {}{took}", step.name, step.found);
    for line in &step.lines {
        let _infallible = writeln!(page, "    {line}");
    }
    for advice in &step.advice {
        let _infallible = writeln!(page, "    -> {}: {}", advice.side, advice.text);
    }
}
