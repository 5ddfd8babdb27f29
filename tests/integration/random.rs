//! Random archives and random requests, over the wire, in each of the protocol's modes.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::archive_writer::{PASSWORD, image};
use crate::snapshot::property::{
    Member, choices, file_name, may_be_ambiguous, plan, range, write_chain,
};
use crate::support::client::{CMD_READ, EIO};
use crate::support::server::Server;
use crate::support::structured::{CMD_FLAG_DF, CMD_FLAG_REQ_ONE, HOLE, Mode, Outcome, Question};

/// A request by fractions of the export, so that it fits whatever the size is.
#[derive(Debug, Clone)]
struct Wish {
    at: Index,
    length: u16,
    status: bool,
    flagged: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    let fields = (any::<Index>(), any::<u16>(), prop::bool::weighted(0.3), any::<bool>());
    fields.prop_map(|(at, length, status, flagged)| Wish { at, length, status, flagged })
}

impl Wish {
    fn question(&self, mode: Mode, size: usize, cookie: usize) -> Question {
        let (at, length) = range(self.at, self.length, size);
        let (offset, length) = (at as u64, length as u64);
        let (question, flag) = match mode {
            Mode::Simple => (Question::read(offset, length), 0),
            _ if self.status => (Question::status(offset, length), CMD_FLAG_REQ_ONE),
            _ => (Question::read(offset, length), CMD_FLAG_DF),
        };
        question.flags(if self.flagged { flag } else { 0 }).cookie(cookie as u64)
    }
}

/// What the server says of a range has to be true of the bytes that were packed.
fn check(question: &Question, outcome: &Outcome, newer: &[u8], older: &[u8]) {
    assert_eq!(outcome.error, None, "{question:?}");
    let (start, end) = (question.offset as usize, (question.offset + question.length) as usize);
    if outcome.status.is_empty() {
        assert!(outcome.data == newer[start..end], "{question:?}");
        return;
    }
    for (id, extents) in &outcome.status {
        let mut from = start;
        for extent in extents {
            let to = from + extent.length as usize;
            let bytes = &newer[from..to];
            match (id, extent.flags) {
                (1, HOLE) => assert!(bytes.iter().all(|&byte| byte == 0), "{from} to {to}"),
                (2, 0) => assert!(older.get(from..to) == Some(bytes), "{from} to {to}"),
                (1, 0) | (2, 1) => {}
                other => panic!("unexpected: {other:?}"),
            }
            from = to;
        }
        assert!(from > start && from <= end, "{question:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_request_in_any_mode_is_answered_right(
        plans in vec(plan(), 1..=4),
        wishes in vec(wish(), 1..60),
        is_decided in prop::bool::weighted(0.7),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let chain = write_chain(&plans, folder.path());
        let decisions = choices(&chain).filter(|_| is_decided);
        let server = Server::builder()
            .args(decisions.flat_map(|choice| ["--resolve-references", choice]))
            .args(["--raw", "--export-dir"])
            .arg(folder.path())
            .env("HEXZ_PASSWORD", PASSWORD)
            .start();
        for (number, Member { writer, .. }) in chain.iter().enumerate() {
            let newer = image(&writer.main);
            let parent = number.saturating_sub(1);
            let older = image(&chain[parent].writer.main);
            let may_fail = !is_decided && may_be_ambiguous(&chain, number);
            if newer.is_empty() {
                continue;
            }
            let changed = format!("hexz:changed:{}", file_name(parent));
            for mode in Mode::ALL {
                let contexts: &[&str] = match mode {
                    Mode::Simple => &[],
                    _ if writer.parents.is_empty() => &["base:allocation"],
                    _ => &["base:allocation", &changed],
                };
                let mut peer = server.peer(mode, &file_name(number), contexts);
                assert_eq!(peer.export.size, newer.len() as u64);
                let questions: Vec<_> = wishes
                    .iter()
                    .enumerate()
                    .map(|(cookie, wish)| wish.question(mode, newer.len(), cookie))
                    .collect();
                // All at once: answers come in any order, and each just once.
                let outcomes = peer.ask_all(&questions);
                assert_eq!(outcomes.len(), questions.len());
                for question in &questions {
                    let outcome = &outcomes[&question.cookie];
                    let is_read = question.command == CMD_READ;
                    if may_fail && is_read && outcome.number() == EIO {
                        continue;
                    }
                    check(question, outcome, &newer, &older);
                }
            }
        }
    }
}
