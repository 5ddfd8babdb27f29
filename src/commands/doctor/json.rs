//! Renders a report as JSON. `--help` documents the fields.

use serde_json::{Value, json};

use super::report::{Advice, Outcome, Report, Step};

pub(super) fn render(report: &Report) -> Value {
    let steps: Vec<Value> = report.steps.iter().map(step).collect();
    json!({
        "target": report.target,
        "outcome": outcome_label(report.outcome()),
        "steps": steps,
    })
}

fn step(step: &Step) -> Value {
    let advice: Vec<Value> = step
        .advice
        .iter()
        .map(|Advice { side, reason, text }| {
            json!({ "side": side.to_string(), "reason": reason, "text": text })
        })
        .collect();
    json!({
        "step": step.name,
        "outcome": outcome_label(step.outcome),
        "reasons": step.reasons,
        "found": step.found,
        "lines": step.lines,
        "details": step.details,
        "advice": advice,
        "seconds": step.took.map(|took| took.as_secs_f64()),
    })
}

fn outcome_label(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Good => "good",
        Outcome::Warning => "warning",
        Outcome::Bad => "bad",
    }
}
