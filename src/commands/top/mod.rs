//! `hexz-nbd top`: shows the activity of a server in a terminal, as its status listener reports it.
//!
//! It queries the listener ([`fetch`]), keeps the latest answers ([`history`]), turns them into
//! lines ([`view`], [`rows`], [`lines`], [`figures`]), and draws those ([`terminal`]).

mod fetch;
mod figures;
mod history;
mod lines;
mod rows;
mod status;
mod terminal;
mod view;
#[cfg(test)]
mod view_tests;

use std::io::{self, IsTerminal, Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::cli::Top;
use crate::failure::Failure;
pub(crate) use fetch::AskError;
use history::History;
use terminal::Terminal;
use view::{Choice, longest, plain, screen};

/// Action that a key stands for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    End,
    See(Choice),
}

/// Shows the server's activity until the user quits, or prints it once.
pub(crate) fn run(options: &Top) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = if options.once || !stdout().is_terminal() {
        runtime.block_on(print_once(options))
    } else {
        runtime.block_on(watch(options))
    };
    // A pending name lookup must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn print_once(options: &Top) -> Result<ExitCode, Failure> {
    let mut history = History::default();
    history.note(Instant::now(), Ok(fetch::ask(&options.place).await?));
    sleep(options.interval).await;
    let status = fetch::ask(&options.place).await?;
    history.note(Instant::now(), Ok(status));
    let lines: String = plain(&history.picture(Instant::now()))
        .iter()
        .map(|line| format!("{}\n", line.text()))
        .collect();
    match stdout().write_all(lines.as_bytes()) {
        // The reader of the pipe, such as `head`, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        written => Ok(written.map(|()| ExitCode::SUCCESS)?),
    }
}

async fn watch(options: &Top) -> Result<ExitCode, Failure> {
    let mut signals = Signals::new()?;
    let mut terminal = Terminal::take()?;
    let mut events = terminal::events();
    let mut ticks = interval(options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut history = History::default();
    let mut choice = Choice::default();
    // The request in flight. It continues while keys are handled.
    let mut question = None;
    loop {
        let (columns, height) = terminal.size();
        let picture = history.picture(Instant::now());
        let rows = longest(&picture, &choice);
        terminal.draw(&screen(&picture, &choice, columns, height), columns)?;
        tokio::select! {
            _ = ticks.tick(), if question.is_none() => {
                question = Some(Box::pin(fetch::ask(&options.place)));
            }
            answer = async { match &mut question {
                Some(question) => question.await,
                None => std::future::pending().await,
            } } => {
                question = None;
                history.note(Instant::now(), answer);
            }
            event = events.recv() => match event {
                Some(Event::Key(key)) => match wish(key, choice, height, rows) {
                    Some(Wish::End) => return Ok(ExitCode::SUCCESS),
                    Some(Wish::See(other)) => choice = other,
                    None => {}
                },
                // Other events, such as a resize, only need a redraw.
                Some(_) => {}
                None => return Err(io::Error::other("the terminal can't be read any more").into()),
            },
            code = signals.next() => return Ok(ExitCode::from(code)),
        }
    }
}

/// Maps a key to an action, for a screen of `height` lines and a list of `rows` rows.
fn wish(key: KeyEvent, choice: Choice, height: usize, rows: usize) -> Option<Wish> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let page = height.saturating_sub(10).max(1);
    let see = |choice| Some(Wish::See(choice));
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Wish::End),
        KeyCode::Char('q') | KeyCode::Esc => Some(Wish::End),
        KeyCode::Char('s') => see(Choice { sort: choice.sort.next(), ..choice }),
        KeyCode::Char('e') => see(Choice { show: choice.show.next(), skip: 0, ..choice }),
        KeyCode::Down => see(choice.below(1, rows)),
        KeyCode::Up => see(choice.above(1)),
        KeyCode::PageDown => see(choice.below(page, rows)),
        KeyCode::PageUp => see(choice.above(page)),
        KeyCode::Home => see(Choice { skip: 0, ..choice }),
        _ => None,
    }
}

/// Signals that end the program, with their exit codes.
struct Signals([(Signal, u8); 4]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            (signal(SignalKind::hangup())?, 129),
            (signal(SignalKind::interrupt())?, 130),
            (signal(SignalKind::quit())?, 131),
            (signal(SignalKind::terminate())?, 143),
        ]))
    }

    /// Waits for a signal, and returns its exit code as in shells: 128 plus its number.
    async fn next(&mut self) -> u8 {
        let [(hangup, one), (interrupt, two), (quit, three), (terminate, four)] = &mut self.0;
        tokio::select! {
            _ = hangup.recv() => *one,
            _ = interrupt.recv() => *two,
            _ = quit.recv() => *three,
            _ = terminate.recv() => *four,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_what_the_help_says() {
        let see = |code| match wish(KeyEvent::from(code), Choice::default(), 24, 12) {
            Some(Wish::See(choice)) => choice,
            other => panic!("{other:?}"),
        };
        let end = |key| assert_eq!(wish(key, Choice::default(), 24, 12), Some(Wish::End));
        end(KeyEvent::from(KeyCode::Char('q')));
        end(KeyEvent::from(KeyCode::Esc));
        end(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert_eq!(see(KeyCode::Char('s')).sort, view::Sort::Requests);
        assert_eq!(see(KeyCode::Char('e')).show, view::Show::Exports);
        assert_eq!(see(KeyCode::PageDown).skip, 11);
        assert_eq!(see(KeyCode::Up).skip, 0);
        assert_eq!(wish(KeyEvent::from(KeyCode::Char('x')), Choice::default(), 24, 12), None);
    }
}
