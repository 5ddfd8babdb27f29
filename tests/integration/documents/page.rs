//! Parses a page into steps: commands to run, files to write, output and log lines to compare.
//!
//! An indented block contains commands. A `console` block contains commands, each after a `$ `,
//! and their output, in which `…` stands for any text. Every other block needs a comment just
//! before it that states its purpose:
//!
//! ```text
//! <!-- not run: REASON -->    not run; a test lists the permitted reasons
//! <!-- file: PATH -->         content of that file
//! <!-- output -->             output of the previous command
//! <!-- log -->                log lines of the page's servers, in any order
//! ```
//!
//! These comments belong to blocks of commands; the first can also stand alone:
//!
//! ```text
//! <!-- prepare: COMMANDS -->  commands that the reader has run already, such as copying a file
//! <!-- fails: CODE -->        exit code of the block's last command
//! ```

/// A shell command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub line: usize,
    pub text: String,
    /// Expected output; not compared if the page doesn't show it.
    pub prints: Option<Vec<String>>,
    pub code: u8,
    /// True if it runs until it is terminated.
    pub is_server: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Run(Command),
    File { path: String, text: String },
    Log { line: usize, wanted: Vec<String> },
    NotRun { line: usize, why: String },
}

/// Content of the comments before a block.
#[derive(Default)]
struct Notes {
    not_run: Option<String>,
    file: Option<String>,
    output: bool,
    log: bool,
    fails: Option<u8>,
}

/// Returns a page's steps, in order.
pub fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut notes = Notes::default();
    let mut lines = page.lines().enumerate().map(|(at, line)| (at + 1, line)).peekable();
    let mut blank_before = true;
    while let Some((at, line)) = lines.next() {
        let starts_block = std::mem::replace(&mut blank_before, line.trim().is_empty());
        if line.starts_with("<!--") {
            let mut comment = line.to_owned();
            while !comment.contains("-->") {
                let (_, more) = lines.next().unwrap_or_else(|| panic!("{at}: no end of: {line}"));
                comment = comment + "\n" + more;
            }
            read_comment(at, &comment, &mut notes, &mut steps);
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
            add(&mut steps, std::mem::take(&mut notes), language, &block);
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
            add(&mut steps, std::mem::take(&mut notes), "", &block);
        }
    }
    steps
}

fn read_comment(at: usize, comment: &str, notes: &mut Notes, steps: &mut Vec<Step>) {
    let said = comment.trim_start_matches("<!--").trim_end_matches("-->").trim();
    let (word, rest) = said.split_once(':').unwrap_or((said, ""));
    let rest = rest.trim();
    match word {
        "not run" => notes.not_run = Some(rest.to_owned()),
        "file" => notes.file = Some(rest.to_owned()),
        "output" => notes.output = true,
        "log" => notes.log = true,
        "fails" => notes.fails = Some(rest.parse().expect("an exit code")),
        "prepare" => steps.push(Step::Run(command(at, rest.to_owned()))),
        _ => panic!("{at}: what is {comment}?"),
    }
}

/// Adds the steps of a block. Its kind follows from the comments before it, or else from its
/// language.
fn add(steps: &mut Vec<Step>, notes: Notes, language: &str, block: &[(usize, &str)]) {
    let line = block.first().expect("a block that isn't empty").0;
    let lines = || block.iter().map(|&(_, line)| line.to_owned()).collect::<Vec<_>>();
    if let Some(why) = notes.not_run {
        steps.push(Step::NotRun { line, why });
    } else if let Some(path) = notes.file {
        steps.push(Step::File { path, text: lines().join("\n") + "\n" });
    } else if notes.log {
        steps.push(Step::Log { line, wanted: lines() });
    } else if notes.output {
        let command = last_command(steps).unwrap_or_else(|| panic!("{line}: the output of what?"));
        command.prints = Some(lines());
    } else if language.is_empty() {
        commands(steps, block);
    } else if language == "console" {
        console(steps, block);
    } else {
        panic!("line {line}: a block of {language} whose comment doesn't say what it is for");
    }
    if let Some(code) = notes.fails {
        let command = last_command(steps).expect("a command that fails");
        (command.code, command.is_server) = (code, false);
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

fn command(line: usize, text: String) -> Command {
    let is_server = is_server(&text);
    Command { line, text, prints: None, code: 0, is_server }
}

/// Subcommands that don't serve.
pub const COMMANDS: [&str; 14] = [
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
    "man",
    "completions",
];

/// Returns true if the command is a server, which runs until it is terminated.
fn is_server(text: &str) -> bool {
    // Further words with which the program doesn't serve.
    const ENDS: [&str; 5] = ["help", "--check-config", "--help", "--version", "--once"];
    let mut words = text.split_ascii_whitespace().skip_while(|word| word.contains("_PASSWORD="));
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

<!-- prepare: four
five -->
<!-- fails: 3 -->
```console
$ hexz-nbd snap.hexz
ready
$ six
```

<!-- file: a.toml -->
```toml
key = 1
```

<!-- not run: needs a kernel -->

    seven
";
    let run = |line, text: &str| command(line, text.to_owned());
    let server = Command { prints: Some(vec!["ready".into()]), ..run(12, "hexz-nbd snap.hexz") };
    assert!(server.is_server);
    let expected = [
        Step::Run(run(4, "one")),
        Step::Run(run(5, "two \\\n    three")),
        Step::Run(run(8, "four\nfive")),
        Step::Run(server),
        Step::Run(Command { code: 3, ..run(14, "six") }),
        Step::File { path: "a.toml".into(), text: "key = 1\n".into() },
        Step::NotRun { line: 24, why: "needs a kernel".into() },
    ];
    assert_eq!(steps(page), expected);
}

#[test]
#[should_panic(expected = "whose comment doesn't say")]
fn blocks_of_unknown_purpose_are_rejected() {
    steps("```toml\nkey = 1\n```\n");
}
