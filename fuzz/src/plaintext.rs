//! The greeting and the leg in clear of a server that requires TLS: nothing but STARTTLS and
//! ABORT is answered with anything but an error, and behind STARTTLS not a byte is read.

use arbitrary::{Arbitrary, Unstructured};
use nbd_server::wire::handshake::Greeting;
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::{NegotiationLimits, PlaintextOutcome, greet, plaintext_leg};

use crate::options::{Said, options_of};
use crate::replies::OptionReplies;
use crate::script::{Script, run};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    flags: u32,
    pieces: &'a [u8],
    options: Vec<Said<'a>>,
    tail: &'a [u8],
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    // Most bits of the flags end the session at once.
    let flags = if input.flags % 8 == 0 { input.flags } else { input.flags % 4 };
    let mut bytes = flags.to_be_bytes().to_vec();
    input.options.iter().for_each(|option| option.encode(&mut bytes));
    bytes.extend(input.tail);
    let mut script = Script::new(&bytes, input.pieces);

    let greeted = run(greet(&mut script));
    let greeting = script.output.split_off(0);
    assert!(Greeting::decode(greeting.as_slice().try_into().expect("18 bytes")).is_ok());
    assert_eq!(script.consumed(), 4);
    // Bits 0 and 1 are offered, nothing else is.
    assert_eq!(greeted.is_ok(), flags < 4);
    let Ok(greeted) = greeted else { return };
    let mut quota = NegotiationLimits::default().quota();
    let outcome = run(plaintext_leg(&mut script, greeted, &mut quota));
    let consumed = script.consumed();
    let mut replies = OptionReplies::new(&script.output);

    // The judge: what must have come of each option.
    let mut at = 4;
    if flags & 1 == 0 {
        assert!(outcome.is_err() && consumed == at, "no fixed newstyle, no TLS");
        return replies.expect_end();
    }
    for option in options_of(&bytes[at..]) {
        let Some((number, data)) = option else {
            // Cut short, out of step, or longer than anything that is meant.
            assert!(outcome.is_err());
            return replies.expect_end();
        };
        at += 16 + data.len();
        let number = Opt(number);
        match number {
            Opt::STARTTLS if data.is_empty() => {
                assert_eq!(replies.next(number).reply, Rep::ACK);
                assert!(matches!(outcome, Ok(PlaintextOutcome::StartTls)));
                assert_eq!(consumed, at, "what follows belongs to TLS");
                return replies.expect_end();
            }
            Opt::STARTTLS => assert_eq!(replies.next(number).reply, Rep::ERR_INVALID),
            Opt::ABORT => {
                assert_eq!(replies.next(number).reply, Rep::ACK);
                assert!(matches!(outcome, Ok(PlaintextOutcome::ClientLeft)) && consumed == at);
                return replies.expect_end();
            }
            Opt::EXPORT_NAME => {
                assert!(outcome.is_err() && consumed == at);
                return replies.expect_end();
            }
            _ => assert_eq!(replies.next(number).reply, Rep::ERR_TLS_REQD),
        }
    }
    assert!(matches!(outcome, Ok(PlaintextOutcome::ClientLeft)) && consumed == bytes.len());
    replies.expect_end();
}
