//! What came of it, as Markdown and JSON.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cases::Case;
use crate::plot;
use crate::row::{Figure, Row};

/// All that was measured, and on what.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    machine: Vec<String>,
    versions: Vec<String>,
    pub(crate) results: Vec<CaseResult>,
    #[serde(skip)]
    is_whole: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CaseResult {
    pub(crate) case: Case,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(machine: Vec<String>, versions: Vec<String>) -> Self {
        Self { machine, versions, results: Vec::new(), is_whole: true }
    }

    pub(crate) fn add(&mut self, case: Case, rows: Result<Vec<Row>>) {
        let rows = rows.unwrap_or_else(|error| {
            eprintln!("  {error:#}");
            self.is_whole = false;
            vec![Row::failed(&error)]
        });
        self.results.push(CaseResult { case, rows });
    }

    /// Reads an earlier report from `folder`.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("results.json");
        let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Takes over the cases of an earlier report in `folder` that haven't been measured again.
    pub(crate) fn keep_others(&mut self, folder: &Path) -> Result<()> {
        let earlier = Self::read(folder)?;
        let measured: Vec<Case> = self.results.iter().map(|result| result.case).collect();
        let others = earlier.results.into_iter().filter(|it| !measured.contains(&it.case));
        self.results.extend(others);
        self.results.sort_by_key(|result| result.case);
        Ok(())
    }

    /// Whether every case could be measured.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole
    }

    pub(crate) fn rows(&self, case: Case) -> &[Row] {
        let result = self.results.iter().find(|result| result.case == case);
        result.map_or(&[], |result| &result.rows)
    }

    pub(crate) fn print(&self) -> Result<()> {
        println!("{}", self.markdown()?);
        Ok(())
    }

    /// Writes the table, the same for programs, and the plots.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        fs::write(folder.join("table.md"), self.markdown()?)?;
        fs::write(folder.join("results.json"), serde_json::to_string_pretty(self)? + "\n")?;
        plot::write(self, folder)
    }

    fn markdown(&self) -> Result<String> {
        let mut text = String::new();
        for line in self.machine.iter().chain(&self.versions) {
            writeln!(text, "- {line}")?;
        }
        writeln!(
            text,
            "\n| What | hexz-nbd | Compared with | | Ratio | Aim | CPU of hexz-nbd | CPU of the \
             other | Met |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |"
        )?;
        let mut notes = Vec::new();
        for (case, row) in
            self.results.iter().flat_map(|result| result.rows.iter().map(|row| (result.case, row)))
        {
            let mark = row.note.as_ref().map(|note| {
                notes.push(note);
                format!(" [{}]", notes.len())
            });
            let what = if row.what.is_empty() { format!("{case:?}") } else { row.what.clone() };
            let theirs = match (&row.theirs, &row.ours) {
                (None, Some(_)) => "not installed".to_owned(),
                (figure, _) => shown(figure),
            };
            let ratio = row.ratio.map(|ratio| match ratio {
                ..0.005 => "< 0.01".to_owned(),
                ratio => format!("{ratio:.2}"),
            });
            let met = match (row.aim, row.is_met) {
                (Some(_), Some(true)) => "yes",
                (Some(_), Some(false)) => "no",
                (Some(_), None) => "not measured",
                (None, _) => "",
            };
            let cells = [
                what + mark.as_deref().unwrap_or_default(),
                shown(&row.ours),
                row.other.clone(),
                theirs,
                ratio.unwrap_or_default(),
                row.aim.map_or(String::new(), |aim| aim.to_string()),
                shown(&row.our_cpu),
                shown(&row.their_cpu),
                met.to_owned(),
            ];
            writeln!(text, "| {} |", cells.join(" | "))?;
        }
        for (number, note) in notes.iter().enumerate() {
            writeln!(text, "\n[{}] {note}.", number + 1)?;
        }
        Ok(text)
    }
}

fn shown(figure: &Option<Figure>) -> String {
    figure.map_or(String::new(), |figure| figure.to_string())
}
