//! Rules files: what a file says, as it is understood and judged by, against a judge that
//! tries every way to match and goes through the rules from the top.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};
use nbd_gateway::access::{
    AccessRequest, Fact, Identity, IdentityName, NameKind, Peer, Rules, Timestamp, parse_rules,
};

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    /// Rules that make sense, and a client.
    Sense { rules: Vec<Rule>, client: Client },
    /// Whatever somebody may write into the file.
    Text(&'a str),
}

#[derive(Debug, Arbitrary)]
struct Rule {
    allow: bool,
    networks: Vec<Network>,
    identities: Vec<(Option<Kind>, Pattern)>,
    exports: Vec<Pattern>,
    hours: Vec<Window>,
    from: Option<u32>,
    until: Option<u32>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Network {
    Unix,
    V4 { address: [u8; 4], prefix: u8 },
}

#[derive(Debug, Clone, Copy, PartialEq, Arbitrary)]
enum Kind {
    Uri,
    Dns,
    Email,
    CommonName,
}

/// A few characters, so that patterns and names meet.
#[derive(Debug, Arbitrary)]
struct Pattern(Vec<Character>);

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Character {
    A,
    B,
    CapitalA,
    Slash,
    Star,
    Any,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
struct Window {
    /// Monday is 0.
    first: u8,
    last: u8,
    from: u16,
    until: u16,
}

#[derive(Debug, Arbitrary)]
struct Client {
    /// `None` came by the Unix socket.
    address: Option<[u8; 4]>,
    names: Vec<(Kind, Pattern)>,
    has_certificate: bool,
    export: Pattern,
    /// In seconds.
    now: u32,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    match input {
        Input::Text(text) => {
            // Junk is never a rule that lets in everybody by mistake.
            if let Ok(rules) = parse_rules(text, Path::new("rules.toml")) {
                assert!(!rules.is_empty() && text.contains("action"), "{text:?}");
            }
        }
        Input::Sense { rules, client } => judge(&rules, &client),
    }
}

fn judge(rules: &[Rule], client: &Client) {
    let text: String = rules.iter().map(Rule::text).collect();
    let parsed = match parse_rules(&text, Path::new("rules.toml")) {
        Ok(parsed) => Rules::from_file(&[], parsed),
        Err(error) => {
            let is_empty = rules.is_empty();
            assert!(is_empty || rules.iter().any(Rule::never_holds), "{error}\n{text}");
            return;
        }
    };
    assert!(!rules.iter().any(Rule::never_holds), "{text}");

    let export = client.export.text();
    let identity = client.identity();
    let peer = client.address.map_or(Peer::Unix, |bytes| Peer::ip(Ipv4Addr::from(bytes).into()));
    let complete = AccessRequest {
        peer,
        identity: Fact::Known(identity.as_ref()),
        export: Fact::Known(&export),
        now: Timestamp(client.now.into()),
    };
    let first = rules.iter().find(|rule| rule.fits(client));
    let may = first.is_some_and(|rule| rule.allow);
    assert_eq!(parsed.evaluate(&complete).is_ok(), may, "{client:?}\n{text}");

    // Nobody is turned away early who may come in at last.
    for (identity, export) in [
        (Fact::Pending, Fact::Pending),
        (complete.identity, Fact::Pending),
        (Fact::Pending, complete.export),
    ] {
        let early = parsed.evaluate(&AccessRequest { identity, export, ..complete });
        assert!(!may || early.is_ok(), "{client:?}\n{text}");
    }
    if parsed.is_local_only() {
        let is_local = peer.is_local();
        assert!(!may || is_local, "{client:?}\n{text}");
    }
}

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const DAY: u64 = 24 * 60;

impl Rule {
    fn text(&self) -> String {
        let mut text =
            format!("[[rule]]\naction = \"{}\"\n", if self.allow { "allow" } else { "deny" });
        let mut list = |key: &str, items: Vec<String>| {
            if !items.is_empty() {
                let _ = writeln!(text, "{key} = {items:?}");
            }
        };
        list("network", self.networks.iter().map(Network::text).collect());
        let identity = |(kind, pattern): &(Option<Kind>, Pattern)| {
            format!("{}{}", kind.map_or("", Kind::prefix), pattern.text())
        };
        list("identity", self.identities.iter().map(identity).collect());
        list("export", self.exports.iter().map(Pattern::text).collect());
        list("hours", self.hours.iter().map(Window::text).collect());
        for (key, seconds) in [("from", self.from), ("until", self.until)] {
            if let Some(seconds) = seconds {
                let _ = writeln!(text, "{key} = {}", date(seconds));
            }
        }
        text
    }

    /// Such a rule is refused.
    fn never_holds(&self) -> bool {
        self.from.zip(self.until).is_some_and(|(from, until)| until <= from)
    }

    fn fits(&self, client: &Client) -> bool {
        let in_period = self.from.is_none_or(|from| client.now >= from)
            && self.until.is_none_or(|until| client.now < until);
        fits_one(&self.networks, |network| network.contains(client.address))
            && fits_one(&self.identities, |(kind, pattern)| client.is(*kind, pattern, self.allow))
            && fits_one(&self.exports, |pattern| pattern.matches(&client.export.text(), false))
            && fits_one(&self.hours, |window| window.contains(client.now))
            && in_period
    }
}

fn fits_one<T>(items: &[T], fits: impl Fn(&T) -> bool) -> bool {
    items.is_empty() || items.iter().any(fits)
}

impl Network {
    fn prefix(self) -> u32 {
        match self {
            Self::Unix => 0,
            Self::V4 { prefix, .. } => u32::from(prefix) % 33,
        }
    }

    /// The address with the bits behind the prefix cleared, one by one.
    fn first(self) -> u32 {
        let Self::V4 { address, .. } = self else { return 0 };
        (self.prefix()..32).fold(u32::from_be_bytes(address), |bits, bit| bits & !(1 << (31 - bit)))
    }

    fn text(&self) -> String {
        match self {
            Self::Unix => "unix".to_owned(),
            Self::V4 { .. } => format!("{}/{}", Ipv4Addr::from(self.first()), self.prefix()),
        }
    }

    fn contains(&self, address: Option<[u8; 4]>) -> bool {
        match (self, address) {
            (Self::Unix, None) => true,
            (Self::V4 { .. }, Some(address)) => {
                let bits = u32::from_be_bytes(address);
                (0..self.prefix()).all(|bit| (bits ^ self.first()) >> (31 - bit) & 1 == 0)
            }
            _ => false,
        }
    }
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Uri => "uri:",
            Self::Dns => "dns:",
            Self::Email => "email:",
            Self::CommonName => "cn:",
        }
    }

    fn name_kind(self) -> NameKind {
        match self {
            Self::Uri => NameKind::Uri,
            Self::Dns => NameKind::Dns,
            Self::Email => NameKind::Email,
            Self::CommonName => NameKind::CommonName,
        }
    }
}

impl Pattern {
    /// At least a character, at most a few: trying every way takes exponential time.
    fn text(&self) -> String {
        let character = |character: &Character| match character {
            Character::A => 'a',
            Character::B => 'b',
            Character::CapitalA => 'A',
            Character::Slash => '/',
            Character::Star => '*',
            Character::Any => '?',
        };
        let text: String = self.0.iter().take(8).map(character).collect();
        if text.is_empty() { "a".to_owned() } else { text }
    }

    fn matches(&self, name: &str, ignore_case: bool) -> bool {
        let (mut pattern, mut name) = (self.text(), name.to_owned());
        if ignore_case {
            pattern.make_ascii_lowercase();
            name.make_ascii_lowercase();
        }
        matches(pattern.as_bytes(), name.as_bytes())
    }
}

fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((b'*', rest)), _) => {
            (0..=name.len()).any(|taken| matches(rest, name.get(taken..).unwrap_or_default()))
        }
        (Some((&wanted, rest)), Some((&got, name))) => {
            (wanted == b'?' || wanted == got) && matches(rest, name)
        }
        (Some(_), None) => false,
    }
}

impl Window {
    fn parts(self) -> (usize, usize, u64, u64) {
        let from = u64::from(self.from) % DAY;
        let until = u64::from(self.until) % (DAY + 1);
        // Nothing at all would be refused.
        let until = if until == from { from + 1 } else { until };
        (usize::from(self.first % 7), usize::from(self.last % 7), from, until)
    }

    fn text(&self) -> String {
        let (first, last, from, until) = self.parts();
        let clock = |minutes: u64| format!("{:02}:{:02}", minutes / 60, minutes % 60);
        let name = |day: usize| DAYS.get(day).copied().unwrap_or_default();
        format!("{}-{} {}-{}", name(first), name(last), clock(from), clock(until))
    }

    /// Goes through the days on which it begins, in the weeks around.
    fn contains(&self, now: u32) -> bool {
        let (first, last, from, until) = self.parts();
        let until = if until <= from { until + DAY } else { until };
        // 1970 began on a Thursday; a week more, so that nothing is negative.
        let minute = u64::from(now) / 60 + (3 + 7) * DAY;
        let mut day = first;
        loop {
            let begins = (0..3).map(|back| (minute / (7 * DAY) + 1).saturating_sub(back));
            let hit = begins
                .map(|week| (week * 7 + day as u64) * DAY)
                .any(|begin| minute >= begin + from && minute < begin + until);
            if hit {
                return true;
            }
            if day == last {
                return false;
            }
            day = (day + 1) % 7;
        }
    }
}

impl Client {
    fn identity(&self) -> Option<Identity> {
        self.has_certificate.then(|| {
            let names = self
                .names
                .iter()
                .map(|(kind, text)| IdentityName { kind: kind.name_kind(), text: text.text() });
            Identity::new(names.collect())
        })
    }

    fn is(&self, wanted: Option<Kind>, pattern: &Pattern, to_let_in: bool) -> bool {
        let has_better = to_let_in && self.names.iter().any(|(kind, _)| *kind != Kind::CommonName);
        self.has_certificate
            && self.names.iter().any(|(kind, name)| {
                let counts = match wanted {
                    Some(wanted) => wanted == *kind,
                    None => *kind != Kind::CommonName || !has_better,
                };
                let ignore_case = matches!(kind, Kind::Dns | Kind::Email);
                counts && pattern.matches(&name.text(), ignore_case)
            })
    }
}

/// A time as the file has it, by counting days from 1970 on.
fn date(seconds: u32) -> String {
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let is_leap = |year: u32| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while days >= 365 + u32::from(is_leap(year)) {
        days -= 365 + u32::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u32::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

/// That the judge itself is sound in a few cases.
#[test]
fn the_judge_is_right_where_it_is_plain() {
    assert_eq!(date(0), "1970-01-01T00:00:00Z");
    assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
    assert!(matches(b"a*b", b"aXXb") && !matches(b"a?", b"a"));
    let friday_night = Window { first: 4, last: 4, from: 22 * 60, until: 6 * 60 };
    // Friday, 2 January 1970.
    assert!(friday_night.contains(86_400 + 23 * 3600));
    assert!(friday_night.contains(2 * 86_400 + 3600));
    assert!(!friday_night.contains(86_400 + 3600));
}
