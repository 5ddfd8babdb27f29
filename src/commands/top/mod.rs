//! `hexz-nbd top`: shows the activity of a server in a terminal, as its status listener reports it.
//!
//! It queries the listener ([`fetch`]), keeps the latest answers ([`history`]), turns them into
//! lines ([`view`], [`rows`], [`lines`], [`format`]), and draws those ([`terminal`]).

mod fetch;
mod format;
mod history;
mod lines;
mod rows;
mod stores;
mod terminal;
mod view;
#[cfg(test)]
mod view_tests;

use std::io::{self, IsTerminal, Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::SignalKind;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::cli::Top;
use crate::commands::monitor_client::MonitorClient;
use crate::commands::signals::ExitSignals;
use crate::exit_status::Failure;
use history::History;
use terminal::Terminal;
use view::{ViewOptions, plain, screen, scrollable_rows};

/// Action that a key stands for.
#[derive(Debug, PartialEq, Eq)]
enum KeyAction {
    Quit,
    Show(ViewOptions),
}

/// Shows the server's activity until the user quits, or prints it once.
pub(crate) fn run(options: &Top) -> Result<ExitCode, Failure> {
    let client = MonitorClient::new(&options.place, &options.access)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = if options.once || !stdout().is_terminal() {
        runtime.block_on(print_once(&client, options))
    } else {
        runtime.block_on(watch(&client, options))
    };
    // A pending name lookup must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn print_once(client: &MonitorClient, options: &Top) -> Result<ExitCode, Failure> {
    let mut history = History::default();
    history.record(Instant::now(), Ok(fetch::fetch_status(client).await?));
    sleep(options.interval).await;
    let status = fetch::fetch_status(client).await?;
    history.record(Instant::now(), Ok(status));
    let lines: String = plain(&history.frame(Instant::now()))
        .iter()
        .map(|line| format!("{}\n", line.text()))
        .collect();
    match stdout().write_all(lines.as_bytes()) {
        // The reader of the pipe, such as `head`, has closed it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        written => Ok(written.map(|()| ExitCode::SUCCESS)?),
    }
}

async fn watch(client: &MonitorClient, options: &Top) -> Result<ExitCode, Failure> {
    let mut signals = ExitSignals::new([
        SignalKind::hangup(),
        SignalKind::interrupt(),
        SignalKind::quit(),
        SignalKind::terminate(),
    ])?;
    let mut terminal = Terminal::enter()?;
    let mut events = terminal::events();
    let mut ticks = interval(options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut history = History::default();
    let mut choice = ViewOptions::default();
    // The request in flight. It continues while keys are handled.
    let mut question = None;
    loop {
        let (columns, height) = terminal.size();
        let frame = history.frame(Instant::now());
        let rows = scrollable_rows(&frame, &choice);
        terminal.draw(&screen(&frame, &choice, columns, height), columns)?;
        tokio::select! {
            _ = ticks.tick(), if question.is_none() => {
                question = Some(Box::pin(fetch::fetch_status(client)));
            }
            answer = async { match &mut question {
                Some(question) => question.await,
                None => std::future::pending().await,
            } } => {
                question = None;
                history.record(Instant::now(), answer);
            }
            event = events.recv() => match event {
                Some(Event::Key(key)) => match key_action(key, choice, height, rows) {
                    Some(KeyAction::Quit) => return Ok(ExitCode::SUCCESS),
                    Some(KeyAction::Show(other)) => choice = other,
                    None => {}
                },
                // Other events, such as a resize, only need a redraw.
                Some(_) => {}
                None => return Err(io::Error::other("can't read from the terminal").into()),
            },
            code = signals.next() => return Ok(ExitCode::from(code)),
        }
    }
}

/// Maps a key to an action, for a screen of `height` lines and a list of `rows` rows.
fn key_action(key: KeyEvent, choice: ViewOptions, height: usize, rows: usize) -> Option<KeyAction> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let page = height.saturating_sub(10).max(1);
    let see = |choice| Some(KeyAction::Show(choice));
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
            Some(KeyAction::Quit)
        }
        KeyCode::Char('q') | KeyCode::Esc => Some(KeyAction::Quit),
        KeyCode::Char('s') => see(ViewOptions { sort: choice.sort.next(), ..choice }),
        KeyCode::Char('e') => see(ViewOptions { show: choice.show.next(), skip: 0, ..choice }),
        KeyCode::Down => see(choice.scroll_down(1, rows)),
        KeyCode::Up => see(choice.scroll_up(1)),
        KeyCode::PageDown => see(choice.scroll_down(page, rows)),
        KeyCode::PageUp => see(choice.scroll_up(page)),
        KeyCode::Home => see(ViewOptions { skip: 0, ..choice }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_what_the_help_says() {
        let see = |code| match key_action(KeyEvent::from(code), ViewOptions::default(), 24, 12) {
            Some(KeyAction::Show(choice)) => choice,
            other => panic!("{other:?}"),
        };
        let end = |key| {
            assert_eq!(key_action(key, ViewOptions::default(), 24, 12), Some(KeyAction::Quit));
        };
        end(KeyEvent::from(KeyCode::Char('q')));
        end(KeyEvent::from(KeyCode::Esc));
        end(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert_eq!(see(KeyCode::Char('s')).sort, view::Sort::Requests);
        assert_eq!(see(KeyCode::Char('e')).show, view::TableSelection::Exports);
        assert_eq!(see(KeyCode::PageDown).skip, 11);
        assert_eq!(see(KeyCode::Up).skip, 0);
        assert_eq!(
            key_action(KeyEvent::from(KeyCode::Char('x')), ViewOptions::default(), 24, 12),
            None
        );
    }
}
