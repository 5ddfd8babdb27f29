//! `hexz-nbd doctor`: against our own server, those of others, whatever else may listen, and object
//! stores.

mod kinds;
mod odd;
mod others;
mod ours;
mod scripted;
mod store;

use std::ffi::OsString;

use serde_json::Value;

use crate::support::server::{Ended, run};

/// The page that lists the labels.
const DOCUMENTED: &str = include_str!("../../../docs/troubleshooting.md");

fn doctor<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Ended {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let patience =
        ["--timeout", "5s"].iter().filter(|_| !args.iter().any(|arg| arg == "--timeout"));
    let base = ["doctor"].iter().chain(patience).map(OsString::from);
    run(base.chain(args.iter().cloned()))
}

/// What it found, for machines.
pub(crate) struct Found {
    code: Option<i32>,
    report: Value,
}

pub(crate) fn examine<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Found {
    let ended = doctor(["--json".into()].into_iter().chain(args.into_iter().map(Into::into)));
    let report = serde_json::from_str(&ended.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", ended.stdout, ended.stderr));
    Found { code: ended.code, report }
}

impl Found {
    /// The first step of that name.
    #[track_caller]
    fn step(&self, name: &str) -> &Value {
        let steps = self.report["steps"].as_array().unwrap();
        let step = steps.iter().find(|step| step["step"] == name);
        step.unwrap_or_else(|| panic!("no step \"{name}\": {:#}", self.report))
    }

    fn has(&self, name: &str) -> bool {
        self.report["steps"].as_array().unwrap().iter().any(|step| step["step"] == name)
    }

    #[track_caller]
    fn assert_outcome(&self, name: &str, outcome: &str) -> &Self {
        assert_eq!(self.step(name)["outcome"], outcome, "{name}: {:#}", self.report);
        self
    }

    /// All is well, perhaps with warnings.
    #[track_caller]
    fn assert_works(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{:#}", self.report);
        assert_ne!(self.report["outcome"], "bad");
        self.assert_outcome("first read", "good").assert_outcome("last read", "good");
        self.assert_outcome("goodbye", "good")
    }

    /// That step is the last one and failed for that reason, and has advice on it for that side.
    #[track_caller]
    fn assert_ends(&self, name: &str, reason: &str, side: &str) -> &Self {
        let last = self.report["steps"].as_array().unwrap().last().unwrap();
        assert_eq!(last["step"], name, "{:#}", self.report);
        self.assert_bad(name, reason, side)
    }

    #[track_caller]
    fn assert_bad(&self, name: &str, reason: &str, side: &str) -> &Self {
        assert_eq!((self.code, &self.report["outcome"]), (Some(1), &Value::from("bad")));
        self.assert_outcome(name, "bad").assert_advice(name, reason, side)
    }

    /// That step has a problem with that label, which is documented, and advice on it for that side.
    #[track_caller]
    fn assert_advice(&self, name: &str, reason: &str, side: &str) -> &Self {
        let step = self.step(name);
        assert!(step["reasons"].as_array().unwrap().contains(&reason.into()), "{reason}: {step:#}");
        let is_advised = |advice: &Value| advice["side"] == side && advice["reason"] == reason;
        let advice = step["advice"].as_array().unwrap();
        assert!(advice.iter().any(is_advised), "no advice on {reason} for the {side}: {step:#}");
        assert!(DOCUMENTED.contains(&format!("`{reason}`")), "{reason} isn't documented");
        self
    }

    /// What it found in a step, for paths, names and numbers.
    #[track_caller]
    fn found(&self, name: &str) -> &str {
        self.step(name)["found"].as_str().unwrap()
    }

    /// A detail of a step.
    #[track_caller]
    pub(crate) fn detail(&self, name: &str, detail: &str) -> &Value {
        &self.step(name)["details"][detail]
    }
}
