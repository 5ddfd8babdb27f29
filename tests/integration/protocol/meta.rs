//! `NBD_OPT_LIST_META_CONTEXT`, `NBD_OPT_SET_META_CONTEXT`, "Metadata querying".

use super::{BASE, base, servers};
use crate::support::client::{
    Client, Duplex, EINVAL, FLAGS, OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO,
    OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY,
    REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, ack, info_data, meta_data, option,
};
use crate::support::image;
use crate::support::server::Server;
use crate::support::structured::{Mode, Question};

const ALLOCATION: &str = "base:allocation";
const GRANDCHILD: &str = "grandchild-zstd.hxz";
const BOTH: [u32; 2] = [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT];

/// All contexts of the grandchild, whose parents are child and base.
const ALL: [&str; 5] = [
    "base:allocation",
    "hexz:changed:child-zstd.hxz",
    "qemu:dirty-bitmap:child-zstd.hxz",
    "hexz:changed:base-zstd.hxz",
    "qemu:dirty-bitmap:base-zstd.hxz",
];

fn grandchild() -> Server {
    Server::builder().archive(GRANDCHILD).start()
}

/// A client that may select contexts.
fn structured(server: &Server) -> Client<impl Duplex + use<>> {
    let mut client = server.greeted();
    Mode::Structured.negotiate(&mut client);
    client
}

/// Whether block status works once the export is chosen by that name.
fn works(mut client: Client<impl Duplex>, name: &str) -> bool {
    client.go(name);
    let question = Question::status(0, 4096);
    client.send(&question.encode(Mode::Structured));
    let outcome = client.outcomes_in(Mode::Structured, &[question]).remove(&question.cookie);
    match outcome.unwrap().number() {
        0 => true,
        error => {
            assert_eq!(error, EINVAL);
            false
        }
    }
}

/// "If zero queries are sent, then the server MUST return all the metadata contexts"; in
/// simple mode too: the option "SHOULD NOT be requested unless …", and a server MAY answer.
#[test]
fn list_without_queries_lists_all() {
    for server in servers(GRANDCHILD) {
        let mut client = server.greeted();
        assert_eq!(client.list_contexts(GRANDCHILD, &[]), ALL);
        Mode::Structured.negotiate(&mut client);
        assert_eq!(client.list_contexts("", &[]), ALL);
    }
    assert_eq!(base().greeted().list_contexts("", &[]), [ALLOCATION]);
}

/// "the server MUST return those metadata contexts … which match one or more of the
/// queries", each once. "`base:` … MUST support this as a wildcard"; "the server MUST
/// ignore query strings belonging to an unknown namespace"; "If none of the query strings
/// find any metadata contexts, the server MUST send a single reply of type `NBD_REP_ACK`."
#[test]
fn list_by_name_and_by_wildcard() {
    let server = grandchild();
    let mut client = server.greeted();
    let qemu = [ALL[2], ALL[4]];
    for (queries, expected) in [
        (&[ALLOCATION][..], &ALL[..1]),
        (&["base:"], &ALL[..1]),
        (&["base:", ALLOCATION, "base:"], &ALL[..1]),
        (&["qemu:"], &qemu),
        (&["qemu:dirty-bitmap:"], &qemu),
        (&["qemu:dirty-bitmap:child-zstd.hxz"], &ALL[2..3]),
        (&["hexz:"], &[ALL[1], ALL[3]]),
        (&["hexz:changed:"], &[ALL[1], ALL[3]]),
        (&["hexz:", "x-unknown:thing", "base:"], &[ALL[0], ALL[1], ALL[3]]),
        (&["base:nothing"], &[]),
        (&["base:alloc"], &[]),
        (&["BASE:"], &[]),
        (&["base:allocation "], &[]),
        (&["base:allocation:"], &[]),
        (&["qemu:dirty-bitmap:child"], &[]),
        (&["qemu:allocation-depth"], &[]),
        (&["nbd-server:", "x-:", "é:"], &[]),
        (&[":"], &[]),
        (&["hexz:changed:grandchild-zstd.hxz"], &[]),
    ] {
        assert_eq!(client.list_contexts(GRANDCHILD, queries), expected, "{queries:?}");
    }
}

/// "Otherwise the server MUST reply with a number of `NBD_REP_META_CONTEXT` replies, one for
/// each selected metadata context, each with a unique metadata context ID"; the empty
/// leaf-name "SHOULD NOT select any contexts"; "If zero queries are sent, the server MUST
/// select no metadata contexts."
#[test]
fn set_selects_by_exact_name() {
    let server = grandchild();
    for (queries, expected) in [
        (&[ALLOCATION][..], &ALL[..1]),
        (&[ALLOCATION, ALLOCATION], &ALL[..1]),
        (&ALL, &ALL),
        (&[ALL[3], "x-unknown:", "base:nothing", ALL[0]], &[ALL[0], ALL[3]]),
        (&[], &[]),
        (&["base:"], &[]),
        (&["qemu:"], &[]),
        (&["qemu:dirty-bitmap:"], &[]),
        (&["hexz:", "hexz:changed:", "x-unknown:thing", ":"], &[]),
    ] {
        let mut client = structured(&server);
        let selected = client.set_contexts(GRANDCHILD, queries);
        let names: Vec<&str> = selected.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, expected, "{queries:?}");
        let mut ids: Vec<u32> = selected.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), expected.len());
        // "without selecting at least one metadata context": `NBD_EINVAL`
        assert_eq!(works(client, GRANDCHILD), !expected.is_empty(), "{queries:?}");
    }
}

/// "MUST NOT be requested unless structured replies or extended headers have been negotiated
/// first. If a client attempts to do so, a server SHOULD send `NBD_REP_ERR_INVALID`".
#[test]
fn set_needs_structured_replies() {
    let good = meta_data(BASE.as_bytes(), &[ALLOCATION.as_bytes()]);
    for server in servers(BASE) {
        let mut client = server.greeted();
        for data in [&good[..], b"", b"junk"] {
            client.refused(OPT_SET_META_CONTEXT, data, REP_ERR_INVALID);
        }
        // It has left nothing behind.
        Mode::Structured.negotiate(&mut client);
        assert!(!works(client, BASE));
        for mode in Mode::CHUNKED {
            let mut client = server.greeted();
            mode.negotiate(&mut client);
            assert_eq!(client.set_contexts(BASE, &[ALLOCATION]).len(), 1);
        }
    }
}

/// "Issuing this command replaces all previously-set metadata contexts (including when this
/// command fails)".
#[test]
fn set_replaces_what_was_selected_before() {
    let server = grandchild();
    for (data, kind) in [
        (meta_data(GRANDCHILD.as_bytes(), &[]), None),
        (meta_data(GRANDCHILD.as_bytes(), &[b"base:"]), None),
        (meta_data(b"nothing", &[ALLOCATION.as_bytes()]), Some(REP_ERR_UNKNOWN)),
        (meta_data(GRANDCHILD.as_bytes(), &[b"base"]), Some(REP_ERR_INVALID)),
        (b"junk".to_vec(), Some(REP_ERR_INVALID)),
    ] {
        let mut client = structured(&server);
        client.set_contexts(GRANDCHILD, &[ALLOCATION]);
        match kind {
            Some(kind) => drop(client.refused(OPT_SET_META_CONTEXT, &data, kind)),
            None => assert_eq!(client.option(OPT_SET_META_CONTEXT, &data), [ack()]),
        }
        assert!(!works(client, GRANDCHILD), "{data:?}");
    }
    // The last one counts.
    let mut client = structured(&server);
    client.set_contexts(GRANDCHILD, &["base:"]);
    client.set_contexts(GRANDCHILD, &[ALL[1], ALL[2]]);
    let ids: Vec<u32> =
        client.set_contexts(GRANDCHILD, &[ALL[0]]).into_iter().map(|(id, _)| id).collect();
    client.go(GRANDCHILD);
    let question = Question::status(0, 4096);
    client.send(&question.encode(Mode::Structured));
    let outcome = &client.outcomes_in(Mode::Structured, &[question])[&question.cookie];
    assert_eq!(outcome.status.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
}

/// LIST selects nothing, and takes nothing away.
#[test]
fn list_leaves_the_selection_alone() {
    let server = grandchild();
    let mut client = structured(&server);
    client.list_contexts(GRANDCHILD, &[ALLOCATION]);
    assert!(!works(client, GRANDCHILD));

    let mut client = structured(&server);
    client.set_contexts(GRANDCHILD, &[ALLOCATION]);
    client.list_contexts(GRANDCHILD, &["qemu:"]);
    client.refused(OPT_LIST_META_CONTEXT, b"junk", REP_ERR_INVALID);
    client.option(OPT_LIST, b"");
    assert!(works(client, GRANDCHILD));
}

/// "If the option request is syntactically invalid (such as a query length that would
/// require reading beyond the original length given in the option header), the server MUST
/// fail the request with `NBD_REP_ERR_INVALID`"; also "lacking the required colon".
///
/// qemu-nbd | bytes left over in LIST_META_CONTEXT that look like an option abort the server
#[test]
fn malformed_requests_are_invalid_and_in_step() {
    let good = meta_data(BASE.as_bytes(), &[b"base:", ALLOCATION.as_bytes()]);
    let mut malformed: Vec<Vec<u8>> = (0..good.len()).map(|end| good[..end].to_vec()).collect();
    let with = |more: &[u8]| [&good[..], more].concat();
    malformed.extend([
        with(b"\0"),
        with(b"\0\0\0\x05base:"),
        // Bytes left over that are themselves options.
        with(&option(OPT_ABORT, b"")),
        with(&option(OPT_GO, &info_data(b"", &[]))),
        with(&option(OPT_LIST_META_CONTEXT, &good)),
        option(OPT_ABORT, b""),
        meta_data(BASE.as_bytes(), &[b"base"]),
        meta_data(BASE.as_bytes(), &[b""]),
        meta_data(BASE.as_bytes(), &[b"base:", b"allocation"]),
        meta_data(BASE.as_bytes(), &[&[b':'; 4097]]),
        meta_data(&[b'x'; 4097], &[]),
    ]);
    let set = |at: usize, number: u32| {
        let mut data = good.clone();
        data[at..at + 4].copy_from_slice(&number.to_be_bytes());
        data
    };
    let count_at = 4 + BASE.len();
    for number in [0, 1, 3, 4096, 1 << 31, u32::MAX] {
        malformed.push(set(count_at, number));
        if number != 5 {
            malformed.push(set(0, number));
            malformed.push(set(count_at + 4, number));
        }
    }
    for server in servers(BASE) {
        let mut client = server.greeted();
        Mode::Structured.negotiate(&mut client);
        for data in &malformed {
            for number in BOTH {
                client.refused(number, data, REP_ERR_INVALID);
            }
        }
        assert_eq!(client.list(), [BASE]);
        assert_eq!(client.list_contexts(BASE, &[]), [ALLOCATION]);
        client.set_contexts(BASE, &[ALLOCATION]);
        assert!(works(client, BASE));
    }
}

/// Thousands of queries in one option, as many as it can hold.
#[test]
fn as_many_queries_as_an_option_holds() {
    let server = base();
    let mut client = structured(&server);
    let queries = vec![&b"a:"[..]; (65_536 - 8) / 6];
    assert_eq!(client.option(OPT_LIST_META_CONTEXT, &meta_data(b"", &queries)), [ack()]);
    let queries = vec![ALLOCATION.as_bytes(); (65_536 - 8) / 19];
    for number in BOTH {
        let replies = client.option(number, &meta_data(b"", &queries));
        assert_eq!(replies.len(), 2);
    }
    assert!(works(client, ""));
}

/// `NBD_REP_ERR_UNKNOWN` for an export that isn't there.
#[test]
fn an_unknown_export_is_unknown() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        Mode::Extended.negotiate(&mut client);
        for number in BOTH {
            for name in [&b"nothing"[..], b"\0", b"base-zstd.hxz\0", b"\xff\xfe", &[b'x'; 4096]] {
                client.refused(number, &meta_data(name, &[b"base:"]), REP_ERR_UNKNOWN);
            }
        }
        assert_eq!(client.list(), [BASE]);
    }
}

/// "it referred to the same export name that was ultimately selected": contexts of another
/// name are forgotten, though it be the same export's. INFO in between changes nothing.
#[test]
fn contexts_are_those_of_the_name_that_is_chosen() {
    let server = Server::builder()
        .archive(BASE)
        .archive("sparse-zstd.hxz")
        .args(["--default-export", BASE])
        .start();
    for (set, go, expected) in [
        (BASE, BASE, true),
        ("", "", true),
        ("", BASE, false),
        (BASE, "", false),
        (BASE, "sparse-zstd.hxz", false),
        ("sparse-zstd.hxz", BASE, false),
    ] {
        let mut client = structured(&server);
        client.set_contexts(set, &[ALLOCATION]);
        for name in ["", BASE, "sparse-zstd.hxz"] {
            assert!(client.option(OPT_INFO, &info_data(name.as_bytes(), &[])).len() > 1);
        }
        client.refused(OPT_GO, &info_data(b"nothing", &[]), REP_ERR_UNKNOWN);
        assert_eq!(works(client, go), expected, "{set} {go}");
    }
}

/// "used the same export name for the subsequent `NBD_OPT_GO` (or `NBD_OPT_EXPORT_NAME`)".
#[test]
fn contexts_and_export_name() {
    for server in servers(BASE) {
        for (name, works) in [(BASE, true), ("", false)] {
            let mut client = server.greeted();
            Mode::Structured.negotiate(&mut client);
            client.set_contexts(BASE, &[ALLOCATION]);
            client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
            client.receive(10);
            let question = Question::status(0, 4096);
            client.send(&question.encode(Mode::Structured));
            let outcomes = client.outcomes_in(Mode::Structured, &[question]);
            assert_eq!(outcomes[&question.cookie].number() == 0, works);
        }
    }
}

/// Whether they were selected before or after extended headers makes no difference.
#[test]
fn contexts_outlive_a_change_of_mode() {
    let server = base();
    let mut client = structured(&server);
    client.set_contexts(BASE, &[ALLOCATION]);
    assert_eq!(client.option(OPT_STRUCTURED_REPLY, b""), [ack()]);
    assert_eq!(client.option(OPT_EXTENDED_HEADERS, b""), [ack()]);
    client.go(BASE);
    let question = Question::status(0, 4096);
    client.send(&question.encode(Mode::Extended));
    let outcomes = client.outcomes_in(Mode::Extended, &[question]);
    assert_eq!(outcomes[&question.cookie].status.len(), 1);
}

/// NBD specification, 2021-08 | meta context set before TLS is used after it
///
/// In clear nothing of it is accepted; inside TLS it has to be asked for anew.
#[test]
fn contexts_are_not_selected_in_clear() {
    let [_, server] = servers(BASE);
    let mut client = server.connect();
    client.greet(FLAGS);
    let data = meta_data(BASE.as_bytes(), &[ALLOCATION.as_bytes()]);
    for number in [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS] {
        client.refused(number, b"", REP_ERR_TLS_REQD);
    }
    for number in BOTH {
        client.refused(number, &data, REP_ERR_TLS_REQD);
        client.refused(number, b"junk", REP_ERR_TLS_REQD);
    }
    let mut client = client.starttls(server.pki().client_config());
    client.refused(OPT_SET_META_CONTEXT, &data, REP_ERR_INVALID);
    Mode::Structured.negotiate(&mut client);
    assert!(!works(client, BASE));
}

/// Contexts end with their connection.
#[test]
fn contexts_are_not_remembered_for_the_next_connection() {
    let server = base();
    let mut client = structured(&server);
    client.set_contexts(BASE, &[ALLOCATION]);
    assert!(works(client, BASE));
    let client = structured(&server);
    assert!(!works(client, BASE));
    assert_eq!(server.go("").read_ok(0, 10), image()[..10]);
}
