//! The results, as a Markdown table.

use std::fmt::Write;

use anyhow::{Error, Result};

use crate::cases::Case;

/// A line of the table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) measured: String,
    /// Something to compare with: another program, or another figure of the gateway.
    pub(crate) compared: String,
    pub(crate) goal: String,
    pub(crate) is_met: Option<bool>,
    pub(crate) note: String,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self { what: what.into(), measured: measured.into(), ..Self::default() }
    }

    pub(crate) fn compared(mut self, with: &str, figure: impl AsRef<str>) -> Self {
        self.compared = format!("{with}: {}", figure.as_ref());
        self
    }

    pub(crate) fn goal(mut self, goal: impl Into<String>, is_met: bool) -> Self {
        (self.goal, self.is_met) = (goal.into(), Some(is_met));
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

/// All results, and what they depend on.
pub(crate) struct Table {
    facts: Vec<String>,
    rows: Vec<Row>,
    is_complete: bool,
}

impl Table {
    pub(crate) fn new(machine: Vec<String>, bench: Vec<String>) -> Self {
        let facts = machine.into_iter().chain(bench).collect();
        Self { facts, rows: Vec::new(), is_complete: true }
    }

    /// Adds the rows of a case, or one that says why it failed.
    pub(crate) fn add(&mut self, case: Case, rows: Result<Vec<Row>>) {
        let failed = |error: Error| {
            eprintln!("  {error:#}");
            self.is_complete = false;
            let reason = format!("{error:#}").replace('|', "/").replace('\n', " ");
            vec![Row::new(format!("{case:?}"), "failed").note(reason)]
        };
        let rows = rows.unwrap_or_else(failed);
        self.rows.extend(rows);
    }

    /// Returns true if no case failed.
    pub(crate) fn is_complete(&self) -> bool {
        self.is_complete
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text: String = self.facts.iter().map(|fact| format!("- {fact}\n")).collect();
        text.push_str("\n| What | hexz-nbd | Compared with | Goal | Met | Note |\n");
        text.push_str("| --- | ---: | --- | --- | --- | --- |\n");
        for row in &self.rows {
            let is_met = row.is_met.map_or("", |is_met| if is_met { "yes" } else { "no" });
            let Row { what, measured, compared, goal, note, .. } = row;
            let _ =
                writeln!(text, "| {what} | {measured} | {compared} | {goal} | {is_met} | {note} |");
        }
        text
    }
}
