//! Parses a page into steps: commands to run, files to write, output and log lines to compare.
//!
//! An indented block contains commands. A `console` block contains commands, each after a `$ `,
//! and their output, in which `…` stands for any text. Every other block needs a comment just
//! before it that states its purpose:
//!
//! ```text
//! <!-- not run: REASON -->    not run; a test lists the permitted reasons
//! <!-- file: PATH -->         content of that file; the text before the block names it
//! <!-- log -->                log lines of the page's servers, in any order
//! ```
//!
//! A block of commands can have this comment:
//!
//! ```text
//! <!-- fails: CODE -->        exit code of the block's last command
//! ```
//!
//! Nothing else is in comments: a page has to work for readers, who see only what is rendered.
//! Therefore a server, which runs until it is terminated, is the last command of its block, and the
//! text after it says where the next commands are typed, such as "in another terminal". The next
//! server of a page takes the place of the one before it, also if it fails, unless it is in another
//! terminal.

/// A shell command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub line: usize,
    pub text: String,
    /// Expected output; not compared if the page doesn't show it.
    pub prints: Option<Vec<String>>,
    pub code: u8,
    /// True if it is a server, which runs until it is terminated unless it fails.
    pub is_server: bool,
    /// True if it is typed in another terminal than that of the server.
    pub is_elsewhere: bool,
}

impl Command {
    /// Returns true if it is a server that doesn't fail.
    pub fn serves(&self) -> bool {
        self.is_server && self.code == 0
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Run(Command),
    File { path: String, text: String },
    Log { line: usize, wanted: Vec<String> },
    NotRun { line: usize, why: String, text: String },
}

/// Content of the comments before a block.
#[derive(Default)]
struct Notes {
    not_run: Option<String>,
    file: Option<String>,
    log: bool,
    fails: Option<u8>,
}

/// Phrases that say where commands are typed while a server runs.
const ELSEWHERE: [&str; 3] = ["another terminal", "n a client", "n the client"];

/// Returns a page's steps, in order.
///
/// # Panics
///
/// Panics if the page doesn't work when it is followed literally.
pub fn steps(page: &str) -> Vec<Step> {
    let parsed = parse(page);
    assert!(parsed.faults.is_empty(), "{}", parsed.faults.join("\n"));
    parsed.steps
}

/// Returns the steps of a text that isn't typed from the first line to the last, such as the
/// examples of `--help`.
pub fn steps_of_examples(text: &str) -> Vec<Step> {
    parse(text).steps
}

#[derive(Default)]
struct Parsed {
    steps: Vec<Step>,
    faults: Vec<String>,
    /// Text since the last block.
    text: String,
    /// Text since the block of the server that runs, if no command has followed yet.
    since_server: Option<String>,
}

fn parse(page: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let mut notes = Notes::default();
    let mut lines = page.lines().enumerate().map(|(at, line)| (at + 1, line)).peekable();
    let mut blank_before = true;
    while let Some((at, line)) = lines.next() {
        let starts_block = std::mem::replace(&mut blank_before, line.trim().is_empty());
        if line.starts_with("<!--") {
            read_comment(at, line, &mut notes);
            blank_before = true;
        } else if let Some(language) = line.strip_prefix("```") {
            let mut block = Vec::new();
            loop {
                let (at, line) =
                    lines.next().unwrap_or_else(|| panic!("{at}: a block without end"));
                if line == "```" {
                    break;
                }
                block.push((at, line));
            }
            parsed.add(std::mem::take(&mut notes), language, &block);
        } else if starts_block && line.starts_with("    ") {
            let mut block = vec![(at, &line[4..])];
            while let Some(&(at, line)) = lines.peek() {
                if !line.starts_with("    ") && !line.is_empty() {
                    break;
                }
                block.push((at, line.strip_prefix("    ").unwrap_or_default()));
                lines.next();
            }
            while block.last().is_some_and(|(_, line)| line.is_empty()) {
                block.pop();
            }
            blank_before = true;
            parsed.add(std::mem::take(&mut notes), "", &block);
        } else {
            for text in std::iter::once(&mut parsed.text).chain(&mut parsed.since_server) {
                text.push_str(line);
                // Phrases may be wrapped.
                text.push(' ');
            }
        }
    }
    parsed
}

/// # Panics
///
/// Panics if a comment says anything that isn't described above: readers wouldn't see it.
fn read_comment(at: usize, comment: &str, notes: &mut Notes) {
    let note = comment.strip_prefix("<!--").and_then(|rest| rest.strip_suffix("-->"));
    let note = note.unwrap_or_else(|| panic!("{at}: a comment of several lines: {comment}"));
    let (word, rest) = note.trim().split_once(':').unwrap_or((note.trim(), ""));
    let rest = rest.trim();
    match word {
        "not run" => notes.not_run = Some(rest.to_owned()),
        "file" => notes.file = Some(rest.to_owned()),
        "log" => notes.log = true,
        "fails" => notes.fails = Some(rest.parse().expect("an exit code")),
        _ => panic!("{at}: readers don't see {comment}"),
    }
}

impl Parsed {
    /// Adds the steps of a block. Its kind follows from the comments before it, or else from its
    /// language.
    fn add(&mut self, notes: Notes, language: &str, block: &[(usize, &str)]) {
        let line = block.first().expect("a block that isn't empty").0;
        let lines = || block.iter().map(|&(_, line)| line.to_owned()).collect::<Vec<_>>();
        let text = std::mem::take(&mut self.text);
        let begin = self.steps.len();
        if let Some(why) = notes.not_run {
            self.steps.push(Step::NotRun { line, why, text: lines().join("\n") });
        } else if let Some(path) = notes.file {
            if !text.contains(&format!("`{path}`")) {
                self.faults.push(format!("{line}: the text before the block doesn't name {path}"));
            }
            self.steps.push(Step::File { path, text: lines().join("\n") + "\n" });
        } else if notes.log {
            self.steps.push(Step::Log { line, wanted: lines() });
        } else if language.is_empty() {
            commands(&mut self.steps, block);
        } else if language == "console" {
            console(&mut self.steps, block);
        } else {
            panic!("line {line}: a block of {language} whose comment doesn't say what it is for");
        }
        if let Some(code) = notes.fails {
            last_command(&mut self.steps).expect("a command that fails").code = code;
        }
        self.check_servers(line, begin, &text);
    }

    /// Checks that the commands of a block, which begin with the step `begin`, can be typed one
    /// after another. `text` is before the block.
    fn check_servers(&mut self, line: usize, begin: usize, text: &str) {
        let names_place = |text: &str| ELSEWHERE.iter().any(|phrase| text.contains(phrase));
        let added = self.steps[begin..].iter_mut().filter_map(|step| match step {
            Step::Run(command) => Some(command),
            _ => None,
        });
        let mut added: Vec<&mut Command> = added.collect();
        let Some((last, others)) = added.split_last_mut() else { return };
        if others.iter().any(|command| command.serves()) {
            self.faults.push(format!("{line}: commands in a block after a server"));
        }
        last.is_elsewhere = names_place(text);
        let since = self.since_server.take().filter(|_| !last.is_server);
        if since.is_some_and(|text| !names_place(&text)) {
            self.faults.push(format!("{line}: where to type this while the server runs?"));
        }
        if last.serves() {
            self.since_server = Some(String::new());
        }
    }
}

fn last_command(steps: &mut [Step]) -> Option<&mut Command> {
    steps.iter_mut().rev().find_map(|step| match step {
        Step::Run(command) => Some(command),
        _ => None,
    })
}

/// Adds the commands of a block without output. A backslash continues a command on the next line.
fn commands(steps: &mut Vec<Step>, block: &[(usize, &str)]) {
    let mut block = block.iter().filter(|(_, line)| !line.trim().is_empty());
    while let Some(&(at, line)) = block.next() {
        let mut text = line.to_owned();
        while text.ends_with('\\') {
            text = text + "\n" + block.next().expect("a continued line").1;
        }
        steps.push(Step::Run(command(at, text)));
    }
}

/// Adds the commands of a block with prompts, and their output.
fn console(steps: &mut Vec<Step>, block: &[(usize, &str)]) {
    let mut block = block.iter();
    while let Some(&(at, line)) = block.next() {
        let Some(text) = line.strip_prefix("$ ") else {
            let command = last_command(steps).unwrap_or_else(|| panic!("{at}: whose output?"));
            command.prints.get_or_insert_default().push(line.to_owned());
            continue;
        };
        let mut text = text.to_owned();
        while text.ends_with('\\') {
            text = text + "\n" + block.next().expect("a continued line").1;
        }
        steps.push(Step::Run(command(at, text)));
    }
}

pub fn command(line: usize, text: String) -> Command {
    let is_server = is_server(&text);
    Command { line, text, prints: None, code: 0, is_server, is_elsewhere: false }
}

/// Subcommands that don't serve.
pub const COMMANDS: [&str; 15] = [
    "cache",
    "check",
    "pki",
    "verify",
    "doctor",
    "inspect",
    "digest",
    "tree",
    "top",
    "health",
    "trace",
    "warm",
    "reload",
    "man",
    "completions",
];

/// Returns true if the command is a server, which runs until it is terminated unless it fails.
fn is_server(text: &str) -> bool {
    // Further words with which the program doesn't serve.
    const ENDS: [&str; 5] = ["help", "--check-config", "--help", "--version", "--once"];
    let is_prefix = |word: &&str| *word == "sudo" || word.contains("_PASSWORD=");
    let mut words = text.split_ascii_whitespace().skip_while(is_prefix);
    let rest: Vec<&str> = match words.next() {
        Some("systemd-socket-activate") => return true,
        Some("hexz-nbd") => words.collect(),
        _ => return false,
    };
    !rest.iter().any(|word| COMMANDS.contains(word) || ENDS.contains(word))
}

/// Returns true if `text` matches `pattern`, in which `…` stands for any text.
pub fn fits(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.trim_end(), text.trim_end());
    let mut parts = pattern.split('…');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Returns true if `lines` match the `wanted` ones, in which a line `…` stands for any number of
/// lines.
pub fn fit(wanted: &[String], lines: &[&str]) -> bool {
    match wanted.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first.trim() == "…" => {
            (0..=lines.len()).any(|skipped| fit(rest, &lines[skipped..]))
        }
        Some((first, rest)) => {
            lines.split_first().is_some_and(|(line, others)| fits(first, line) && fit(rest, others))
        }
    }
}

#[test]
fn ellipses_match_any_text() {
    for (pattern, text, expected) in [
        ("ready", "ready", true),
        ("ready", "ready, or not", false),
        ("… INFO ready: …", "2026-11-26 INFO ready: serving", true),
        ("a…b…b", "a-b", false),
        ("a…b", "ab", true),
        ("", "x", false),
    ] {
        assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
    }
    let wanted = ["one", "…", "three…"].map(str::to_owned);
    assert!(fit(&wanted, &["one", "three"]));
    assert!(fit(&wanted, &["one", "two", "two", "three!"]));
    assert!(!fit(&wanted, &["one", "two"]));
    assert!(!fit(&wanted, &["one", "three", "four"]));
}

#[test]
fn pages_are_parsed_into_steps() {
    let page = "\
Text, with
    no block.

    one
    two \\
        three

<!-- fails: 3 -->
```console
$ hexz-nbd check
denied
```

Write this into `a.toml`:

<!-- file: a.toml -->
```toml
key = 1
```

```console
$ hexz-nbd snap.hexz
ready
```

In another
terminal:

    six

<!-- not run: needs a kernel -->

    seven
";
    let run = |line, text: &str| command(line, text.to_owned());
    let check = Command { prints: Some(vec!["denied".into()]), ..run(10, "hexz-nbd check") };
    let server = Command { prints: Some(vec!["ready".into()]), ..run(22, "hexz-nbd snap.hexz") };
    assert!(server.is_server);
    let expected = [
        Step::Run(run(4, "one")),
        Step::Run(run(5, "two \\\n    three")),
        Step::Run(Command { code: 3, ..check }),
        Step::File { path: "a.toml".into(), text: "key = 1\n".into() },
        Step::Run(server),
        Step::Run(Command { is_elsewhere: true, ..run(29, "six") }),
        Step::NotRun { line: 33, why: "needs a kernel".into(), text: "seven".into() },
    ];
    assert_eq!(steps(page), expected);
}

#[test]
#[should_panic(expected = "whose comment doesn't say")]
fn blocks_of_unknown_purpose_are_rejected() {
    steps("```toml\nkey = 1\n```\n");
}

#[test]
#[should_panic(expected = "readers don't see")]
fn hidden_steps_are_rejected() {
    steps("<!-- prepare: mkdir folder -->\n\n    ls folder\n");
}

#[test]
#[should_panic(expected = "doesn't name a.toml")]
fn files_without_visible_names_are_rejected() {
    steps("Write a file:\n\n<!-- file: a.toml -->\n```toml\nkey = 1\n```\n");
}

#[test]
#[should_panic(expected = "commands in a block after a server")]
fn commands_after_a_server_are_rejected() {
    steps("    hexz-nbd snap.hexz\n    nbdinfo nbd://localhost\n");
}

#[test]
#[should_panic(expected = "where to type this")]
fn clients_without_a_terminal_are_rejected() {
    steps("    hexz-nbd snap.hexz\n\nThen:\n\n    nbdinfo nbd://localhost\n");
}
