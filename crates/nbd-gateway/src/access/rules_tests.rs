use super::*;
use crate::access::{Identity, IdentityName, NameKind, Peer};

fn networks(texts: &[&str]) -> Vec<PeerMatcher> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn peer(address: &str) -> Peer {
    Peer::ip(address.parse().unwrap())
}

fn admits(allow: &[&str], deny: &[&str], address: &str) -> bool {
    let options = CommandLineRules {
        allow: networks(allow),
        deny: networks(deny),
        ..CommandLineRules::default()
    };
    Rules::from_command_line(&options).evaluate(&AccessRequest::from_peer(peer(address))).is_ok()
}

#[test]
fn only_loopback_is_admitted_by_default() {
    for address in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
        assert!(admits(&[], &[], address), "{address}");
    }
    for address in ["10.0.0.1", "0.0.0.0", "::", "fe80::1", "::ffff:10.0.0.1", "::127.0.0.1"] {
        assert!(!admits(&[], &[], address), "{address}");
    }
    assert!(Rules::default().evaluate(&AccessRequest::from_peer(Peer::Unix)).is_ok());
}

#[test]
fn allow_rules_replace_the_loopback_default() {
    assert!(!admits(&["10.0.0.0/8"], &[], "127.0.0.1"));
}

// nbd-server CVE-2013-6410 | partial address match in the access list
#[test]
fn whole_addresses_are_compared() {
    assert!(admits(&["10.1.2.3"], &[], "10.1.2.3"));
    for address in ["10.1.2.30", "10.1.2.2", "110.1.2.3", "10.1.2.31"] {
        assert!(!admits(&["10.1.2.3"], &[], address), "{address}");
    }
}

#[test]
fn prefix_boundaries_are_exact() {
    assert!(admits(&["0.0.0.0/0"], &[], "255.255.255.255"));
    assert!(!admits(&["0.0.0.0/0"], &[], "::1"));
    assert!(admits(&["::/0"], &[], "2001:db8::1"));
    assert!(!admits(&["::/0"], &[], "10.0.0.1"));
    assert!(admits(&["10.0.0.2/31"], &[], "10.0.0.3"));
    assert!(!admits(&["10.0.0.2/31"], &[], "10.0.0.4"));
    assert!(admits(&["10.0.0.2/32"], &[], "10.0.0.2"));
    assert!(admits(&["2001:db8::7/128"], &[], "2001:db8::7"));
    assert!(!admits(&["2001:db8::7/128"], &[], "2001:db8::8"));
}

#[test]
fn deny_overrides_allow() {
    let (allow, deny) = (&["10.0.0.0/8"], &["10.66.0.0/16"]);
    assert!(admits(allow, deny, "10.65.1.1"));
    assert!(!admits(allow, deny, "10.66.1.1"));
    assert!(!admits(&["10.66.1.1"], deny, "10.66.1.1"));
    assert!(!admits(&[], &["127.0.0.0/8"], "127.0.0.1"));
}

// nbdkit's ip filter before 1.40 | another spelling of the address was admitted
#[test]
fn ipv4_rules_apply_to_mapped_addresses() {
    assert!(admits(&["10.0.0.0/8"], &[], "::ffff:10.1.2.3"));
    assert!(!admits(&["::/0"], &["10.0.0.0/8"], "::ffff:10.1.2.3"));
    assert!(!admits(&["0.0.0.0/0"], &["::ffff:10.0.0.0/104"], "10.1.2.3"));
    assert!(admits(&["::ffff:10.1.2.3"], &[], "10.1.2.3"));
}

fn somebody(name: &str) -> Identity {
    Identity::new(vec![IdentityName { kind: NameKind::CommonName, text: name.to_owned() }])
}

#[test]
fn command_line_requires_both_identity_and_address() {
    let options = CommandLineRules {
        allow: networks(&["10.0.0.0/8"]),
        allow_identity: vec!["alice".parse().unwrap()],
        deny: Vec::new(),
    };
    let rules = Rules::from_command_line(&options);
    let (alice, bob) = (somebody("alice"), somebody("bob"));
    let inside = AccessRequest::from_peer(peer("10.1.1.1"));
    let outside = AccessRequest::from_peer(peer("127.0.0.1"));
    assert!(rules.evaluate(&inside).is_ok(), "it may turn out to be alice");
    assert!(rules.evaluate(&inside.with_identity(Some(&alice))).is_ok());
    assert!(rules.evaluate(&inside.with_identity(Some(&bob))).is_err());
    assert!(rules.evaluate(&inside.with_identity(None)).is_err());
    assert!(rules.evaluate(&outside).is_err());
    assert!(rules.evaluate(&AccessRequest::from_peer(Peer::Unix)).is_err());
    assert!(rules.use_identities() && !rules.is_local_only());

    let anywhere = CommandLineRules { allow: Vec::new(), ..options };
    let rules = Rules::from_command_line(&anywhere);
    assert!(rules.evaluate(&outside.with_identity(Some(&alice))).is_ok());
    assert!(!rules.is_local_only());
}

/// Rules as from a file: nobody in 10.6.0.0/16 may open `secret-*`, alice may open `web-*` and
/// `secret-*`, and clients of Unix sockets may open everything. `--deny` precedes them.
fn rules() -> Rules {
    let rule = |action| Rule::new(action, Origin::Default);
    let mut secret = rule(Action::Deny);
    secret.peers = vec!["10.6.0.0/16".parse().unwrap()];
    secret.exports = vec!["secret-*".parse().unwrap()];
    let mut alice = rule(Action::Allow);
    alice.identities = vec!["alice".parse().unwrap()];
    alice.exports = vec!["web-*".parse().unwrap(), "secret-*".parse().unwrap()];
    let mut unix = rule(Action::Allow);
    unix.peers = vec![PeerMatcher::Unix];
    Rules::from_file(&networks(&["10.66.0.0/16"]), vec![secret, alice, unix])
}

#[test]
fn first_matching_rule_decides() {
    let (rules, alice, bob) = (rules(), somebody("alice"), somebody("bob"));
    let asks = |peer: Peer, who: Option<&Identity>, export: &str| {
        rules
            .evaluate(&AccessRequest::from_peer(peer).with_identity(who).with_export(export))
            .is_ok()
    };
    assert!(asks(peer("10.1.1.1"), Some(&alice), "web-1"));
    assert!(asks(peer("10.1.1.1"), Some(&alice), "secret-1"));
    assert!(!asks(peer("10.6.1.1"), Some(&alice), "secret-1"), "an earlier rule denies it");
    assert!(!asks(peer("10.66.1.1"), Some(&alice), "web-1"), "--deny is asked first");
    assert!(!asks(peer("10.1.1.1"), Some(&alice), "db"));
    assert!(!asks(peer("10.1.1.1"), Some(&bob), "web-1"));
    assert!(!asks(peer("10.1.1.1"), None, "web-1"));
    assert!(asks(Peer::Unix, None, "db"));
}

#[test]
fn unknown_facts_do_not_deny() {
    let (rules, alice, bob) = (rules(), somebody("alice"), somebody("bob"));
    let from_there = AccessRequest::from_peer(peer("10.6.1.1"));
    assert!(rules.evaluate(&from_there).is_ok());
    assert!(rules.evaluate(&from_there.with_identity(Some(&alice))).is_ok());
    assert!(rules.evaluate(&from_there.with_identity(Some(&bob))).is_err());
    assert!(rules.evaluate(&AccessRequest::from_peer(peer("10.66.1.1"))).is_err());
}

#[test]
fn rules_apply_only_in_their_time_window() {
    let mut rule = Rule::new(Action::Allow, Origin::Default);
    rule.windows = vec!["Mon 08:00-09:00".parse().unwrap()];
    let monday = Timestamp(4 * 86_400);
    rule.until = Some(Timestamp(monday.0 + 7 * 86_400));
    let rules = Rules::from_file(&[], vec![rule]);
    let may = |seconds: u64| {
        rules
            .evaluate(&AccessRequest::from_peer(Peer::Unix).at(Timestamp(monday.0 + seconds)))
            .is_ok()
    };
    assert!(may(8 * 3600) && may(9 * 3600 - 1));
    assert!(!may(8 * 3600 - 1) && !may(9 * 3600));
    assert!(!may(7 * 86_400 + 8 * 3600), "the rule has run out");
    assert!(rules.depend_on_time() && !self::rules().depend_on_time());
}

#[test]
fn any_time_criterion_makes_rules_time_dependent() {
    let depends = |change: fn(&mut Rule)| {
        let mut rule = Rule::new(Action::Allow, Origin::Default);
        change(&mut rule);
        Rules::from_file(&[], vec![rule]).depend_on_time()
    };
    assert!(!depends(|_| ()));
    assert!(depends(|rule| rule.windows = vec!["Mon 08:00-09:00".parse().unwrap()]));
    assert!(depends(|rule| rule.from = Some(Timestamp(1))));
    assert!(depends(|rule| rule.until = Some(Timestamp(1))));
}

#[test]
fn refusal_reason_names_the_last_known_fact() {
    let (rules, bob) = (Rules::from_file(&[], Vec::new()), somebody("bob"));
    let anybody = AccessRequest::from_peer(peer("10.1.1.1"));
    assert!(matches!(rules.evaluate(&anybody), Err(Reason::NoRuleForAddress)));
    let client = anybody.with_identity(Some(&bob));
    assert!(matches!(rules.evaluate(&client), Err(Reason::NoRuleForClient)));
    let reader = client.with_export("disk");
    assert!(matches!(rules.evaluate(&reader), Err(Reason::NoRuleForExport)));
    assert!(!rules.use_identities() && self::rules().use_identities());
}

#[test]
fn period_includes_start_and_excludes_end() {
    let mut rule = Rule::new(Action::Allow, Origin::Default);
    (rule.from, rule.until) = (Some(Timestamp(1000)), Some(Timestamp(2000)));
    let rules = Rules::from_file(&[], vec![rule]);
    for (seconds, may) in [(999, false), (1000, true), (1999, true), (2000, false)] {
        let facts = AccessRequest::from_peer(Peer::Unix).at(Timestamp(seconds));
        assert_eq!(rules.evaluate(&facts).is_ok(), may, "{seconds}");
    }
}

/// A virtual machine is covered neither by the default for this machine nor by a network.
#[test]
fn vsock_peers_need_an_explicit_rule() {
    let guest = AccessRequest::from_peer(Peer::Vsock(3));
    let judge = |allow: &[&str], deny: &[&str]| {
        let options = CommandLineRules {
            allow: networks(allow),
            deny: networks(deny),
            ..CommandLineRules::default()
        };
        let rules = Rules::from_command_line(&options);
        assert_eq!(rules.may_admit_vsock(), allow.iter().any(|place| place.starts_with("vsock")));
        rules.evaluate(&guest).is_ok()
    };
    assert!(!judge(&[], &[]));
    assert!(!judge(&["127.0.0.0/8", "::1", "0.0.0.0/0", "::/0", "unix"], &[]));
    assert!(!judge(&["vsock:2", "vsock:4"], &[]));
    assert!(judge(&["vsock:3"], &[]) && judge(&["vsock"], &[]));
    assert!(!judge(&["vsock"], &["vsock:3"]) && judge(&["vsock"], &["vsock:4", "0.0.0.0/0"]));
    // If only this virtual machine is allowed, no other peer is; data sent to it crosses no
    // network.
    let options = CommandLineRules { allow: networks(&["vsock:3"]), ..CommandLineRules::default() };
    let rules = Rules::from_command_line(&options);
    assert!(rules.evaluate(&AccessRequest::from_peer(peer("127.0.0.1"))).is_err());
    assert!(rules.is_local_only());
    // A rule without origins matches all of them.
    let anybody = Rules::from_file(&[], vec![Rule::new(Action::Allow, Origin::Default)]);
    assert!(anybody.evaluate(&guest).is_ok() && anybody.may_admit_vsock());
}

#[test]
fn unix_sockets_can_be_allowed_and_denied() {
    let may = |options: &CommandLineRules, peer| {
        Rules::from_command_line(options).evaluate(&AccessRequest::from_peer(peer)).is_ok()
    };
    let unix = CommandLineRules { allow: networks(&["unix"]), ..CommandLineRules::default() };
    assert!(may(&unix, Peer::Unix) && !may(&unix, peer("127.0.0.1")));
    let denied = CommandLineRules { deny: networks(&["unix"]), ..CommandLineRules::default() };
    assert!(!may(&denied, Peer::Unix) && may(&denied, peer("127.0.0.1")));
    let named = CommandLineRules { allow_identity: vec!["alice".parse().unwrap()], ..unix };
    let rules = Rules::from_command_line(&named);
    assert!(rules.evaluate(&AccessRequest::from_peer(Peer::Unix).with_identity(None)).is_err());
    assert!(
        rules
            .evaluate(&AccessRequest::from_peer(Peer::Unix).with_identity(Some(&somebody("alice"))))
            .is_ok()
    );
}

#[test]
fn empty_rules_admit_nobody() {
    let nobody = Rules::from_file(&[], Vec::new());
    assert!(nobody.evaluate(&AccessRequest::from_peer(Peer::Unix)).is_err());
    assert!(nobody.evaluate(&AccessRequest::from_peer(peer("127.0.0.1"))).is_err());
}

#[test]
fn rules_are_summarized_for_people() {
    assert_eq!(Rules::default().to_string(), "this machine only");
    let options = |allow: &[&str], identities: &[&str], deny: &[&str]| CommandLineRules {
        allow: networks(allow),
        allow_identity: identities.iter().map(|text| text.parse().unwrap()).collect(),
        deny: networks(deny),
    };
    let words = |options: CommandLineRules| Rules::from_command_line(&options).to_string();
    let networks = words(options(&["10.0.0.0/8", "::1"], &[], &["10.6.0.0/16"]));
    assert_eq!(networks, "10.0.0.0/8, ::1/128 except 10.6.0.0/16");
    assert_eq!(words(options(&["10.0.0.0/8"], &["cn:a*"], &[])), "cn:a* from 10.0.0.0/8");
    assert_eq!(words(options(&["unix"], &[], &[])), "unix");
    assert_eq!(words(options(&["unix", "vsock:3"], &[], &["vsock"])), "vsock:3 except vsock");
    assert_eq!(words(options(&["unix"], &["cn:a*"], &[])), "cn:a* from unix");
    let both = options(&["unix", "10.0.0.0/8"], &["cn:a*"], &[]);
    assert_eq!(words(both.clone()), "cn:a* from unix, 10.0.0.0/8");
    let identity =
        Identity::new(vec![IdentityName { kind: NameKind::CommonName, text: "a".into() }]);
    let client = AccessRequest::from_peer(Peer::Unix).with_identity(Some(&identity));
    let reason = Rules::from_command_line(&both).evaluate(&client).unwrap();
    let rule = "allowed by --allow unix, 10.0.0.0/8 --allow-identity cn:a*";
    assert_eq!(reason.to_string(), rule);
    let local = Rules::from_command_line(&options(&["127.0.0.0/8", "::1"], &[], &[]));
    assert!(local.is_local_only() && Rules::default().is_local_only());
    assert!(!Rules::from_command_line(&options(&["10.0.0.0/8"], &[], &[])).is_local_only());
}
