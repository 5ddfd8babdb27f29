//! The terminal: taken over, drawn on, and given back however this ends.

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

use super::lines::{Line, Style};

/// How soon the thread that reads keys sees that nobody wants them any more.
const LOOK_UP: Duration = Duration::from_millis(200);

/// A key held down must not fill the memory of a program that is slow to follow.
const KEYS: usize = 64;

/// The terminal, taken over until this is dropped.
pub(super) struct Terminal {
    out: Stdout,
}

impl Terminal {
    pub(super) fn take() -> io::Result<Self> {
        give_back_on_panic();
        enable_raw_mode()?;
        // From here on dropping it gives the terminal back, also if the next line fails.
        let mut terminal = Self { out: stdout() };
        execute!(terminal.out, EnterAlternateScreen, cursor::Hide, DisableLineWrap)?;
        Ok(terminal)
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        let (columns, lines) = size().unwrap_or((80, 24));
        (columns.into(), lines.into())
    }

    /// Draws a screen of so many columns.
    pub(super) fn draw(&mut self, lines: &[Line], columns: usize) -> io::Result<()> {
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
            // After a line that is full, the cursor is still on its last character.
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
        give_back();
    }
}

fn give_back() {
    // If the terminal is gone, there is nothing to give back.
    let _gone = execute!(stdout(), EnableLineWrap, cursor::Show, LeaveAlternateScreen);
    let _gone = disable_raw_mode();
}

/// What a panic has to say must not go to the screen that is about to vanish.
fn give_back_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        give_back();
        before(panic);
    }));
}

/// What the user does. Ends with the terminal.
pub(super) fn events() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(KEYS);
    thread::spawn(move || {
        while !sender.is_closed() {
            match event::poll(LOOK_UP) {
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
