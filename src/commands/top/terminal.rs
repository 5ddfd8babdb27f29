//! Takes over the terminal, draws on it, and restores it, also after an error or a panic.

use std::io::{self, Stdout, Write, stdout};
use std::thread;
use std::time::Duration;

use crossterm::event::{self, Event};
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::terminal::{
    BeginSynchronizedUpdate, Clear, ClearType, DisableLineWrap, EnableLineWrap,
    EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use crossterm::{cursor, execute, queue};
use tokio::sync::mpsc;

use super::lines::{Style, StyledLine};

/// Interval at which the thread that reads input checks whether its receiver is gone.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Capacity of the event queue. It is bounded, so that a key held down can't fill the memory if
/// drawing is slow.
const EVENT_QUEUE_CAPACITY: usize = 64;

/// The terminal in raw mode. Dropping this restores it.
pub(super) struct Terminal {
    out: Stdout,
}

impl Terminal {
    pub(super) fn enter() -> io::Result<Self> {
        restore_on_panic();
        enable_raw_mode()?;
        // From here on dropping it restores the terminal, even if the next line fails.
        let mut terminal = Self { out: stdout() };
        execute!(terminal.out, EnterAlternateScreen, cursor::Hide, DisableLineWrap)?;
        Ok(terminal)
    }

    /// Returns the number of columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        let (columns, lines) = size().unwrap_or((80, 24));
        (columns.into(), lines.into())
    }

    /// Draws a screen that is `columns` wide.
    pub(super) fn draw(&mut self, lines: &[StyledLine], columns: usize) -> io::Result<()> {
        queue!(self.out, BeginSynchronizedUpdate)?;
        for (row, line) in (0_u16..).zip(lines) {
            queue!(self.out, cursor::MoveTo(0, row))?;
            for (style, text) in &line.0 {
                match style {
                    Style::Plain => {}
                    Style::Strong => queue!(self.out, SetAttribute(Attribute::Bold))?,
                    Style::Soft => queue!(self.out, SetAttribute(Attribute::Dim))?,
                    Style::Warn => queue!(self.out, SetForegroundColor(Color::Yellow))?,
                    Style::Bad => queue!(self.out, SetForegroundColor(Color::Red))?,
                }
                queue!(self.out, Print(text), SetAttribute(Attribute::Reset))?;
            }
            // After a full line the cursor is still on its last character, which this would erase.
            if line.width() < columns {
                queue!(self.out, Clear(ClearType::UntilNewLine))?;
            }
        }
        queue!(self.out, EndSynchronizedUpdate)?;
        self.out.flush()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // If the terminal is gone, there is nothing to restore.
    let _gone = execute!(stdout(), EnableLineWrap, cursor::Show, LeaveAlternateScreen);
    let _gone = disable_raw_mode();
}

/// Makes a panic restore the terminal first: its message must not go to the alternate screen,
/// which is about to vanish.
fn restore_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        before(panic);
    }));
}

/// Returns a channel of input events. It closes when the terminal is gone.
pub(super) fn events() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE_CAPACITY);
    thread::spawn(move || {
        while !sender.is_closed() {
            match event::poll(POLL_INTERVAL) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(_) => break,
            }
            let Ok(event) = event::read() else { break };
            if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(event) {
                break;
            }
        }
    });
    receiver
}
