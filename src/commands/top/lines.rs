//! Styled lines of text, and tables made of them. Every character is one column wide: untrusted
//! text has gone through [`escape_untrusted`](super::format::escape_untrusted).

/// Style of a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Strong,
    Soft,
    Warn,
    Bad,
}

/// A line of text, as pieces of one style each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StyledLine(pub(super) Vec<(Style, String)>);

impl StyledLine {
    pub(super) fn styled(style: Style, text: impl Into<String>) -> Self {
        Self(vec![(style, text.into())])
    }

    pub(super) fn push(&mut self, style: Style, text: impl Into<String>) {
        self.0.push((style, text.into()));
    }

    /// Returns the width in characters.
    pub(super) fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| width(text)).sum()
    }

    /// Cuts the line to at most `most` characters.
    pub(super) fn cut(self, most: usize) -> Self {
        let mut left = most;
        let mut pieces = Vec::new();
        for (style, text) in self.0 {
            let text = cut(text, left);
            left -= width(&text);
            pieces.push((style, text));
        }
        Self(pieces)
    }

    /// Returns the text without styles and without trailing spaces.
    pub(super) fn text(&self) -> String {
        let text: String = self.0.iter().map(|(_, text)| text.as_str()).collect();
        text.trim_end().to_owned()
    }
}

/// Lays out phrases side by side, on as many lines as they need.
pub(super) fn flow(facts: Vec<(Style, String)>, most: usize) -> Vec<StyledLine> {
    fill(facts, "   ", most)
}

/// Wraps text at spaces.
pub(super) fn wrap(style: Style, text: &str, most: usize) -> Vec<StyledLine> {
    fill(text.split(' ').map(|word| (style, word.to_owned())), " ", most)
}

fn fill(
    pieces: impl IntoIterator<Item = (Style, String)>,
    between: &str,
    most: usize,
) -> Vec<StyledLine> {
    let mut lines: Vec<StyledLine> = Vec::new();
    for (style, text) in pieces {
        match lines.last_mut() {
            Some(line) if line.width() + between.len() + width(&text) <= most => {
                line.push(Style::Plain, between);
                line.push(style, text);
            }
            _ => lines.push(StyledLine::styled(style, text)),
        }
    }
    lines
}

/// A column of a table.
#[derive(Debug)]
pub(super) struct Column {
    title: &'static str,
    /// True for text, which is aligned to the left and may be cut. Numbers are aligned to the right
    /// and aren't cut.
    is_text: bool,
    /// Rank for removal if there isn't room for all columns: the highest goes first, 0 never goes.
    removal_rank: u8,
    cells: Vec<(Style, String)>,
}

/// Width below which text isn't cut while there is a column that can be left out instead.
const MIN_TEXT_WIDTH: usize = 16;

impl Column {
    pub(super) fn text(title: &'static str, removal_rank: u8, cells: Vec<String>) -> Self {
        let cells = cells.into_iter().map(|text| (Style::Plain, text)).collect();
        Self { title, is_text: true, removal_rank, cells }
    }

    pub(super) fn numbers(
        title: &'static str,
        removal_rank: u8,
        cells: Vec<(Style, String)>,
    ) -> Self {
        Self { title, is_text: false, removal_rank, cells }
    }

    fn natural_width(&self) -> usize {
        self.cells.iter().map(|(_, text)| width(text)).max().unwrap_or(0).max(width(self.title))
    }
}

/// Lays out a table: a header line and a line for each row, no wider than `most` if given.
pub(super) fn table(mut columns: Vec<Column>, most: Option<usize>) -> Vec<StyledLine> {
    let mut widths = fit(&columns, most);
    while widths.is_none() {
        let Some(removal_rank) =
            columns.iter().map(|column| column.removal_rank).max().filter(|most| *most > 0)
        else {
            break;
        };
        columns.retain(|column| column.removal_rank != removal_rank);
        widths = fit(&columns, most);
    }
    let widths = widths.unwrap_or_else(|| columns.iter().map(Column::natural_width).collect());

    let rows = columns.iter().map(|column| column.cells.len()).max().unwrap_or(0);
    let mut lines = vec![StyledLine::default(); rows + 1];
    for (position, (column, width)) in columns.into_iter().zip(widths).enumerate() {
        let head = (Style::Strong, column.title.to_owned());
        for (line, (style, text)) in lines.iter_mut().zip(std::iter::once(head).chain(column.cells))
        {
            if position > 0 {
                line.push(Style::Plain, "  ");
            }
            let text = cut(text, width);
            line.push(
                style,
                if column.is_text { format!("{text:<width$}") } else { format!("{text:>width$}") },
            );
        }
    }
    match most {
        Some(most) => lines.into_iter().map(|line| line.cut(most)).collect(),
        None => lines,
    }
}

/// Returns the width of each column, or `None` if there isn't room for all. The widest text
/// column shrinks first.
fn fit(columns: &[Column], most: Option<usize>) -> Option<Vec<usize>> {
    let natural = columns.iter().map(Column::natural_width);
    let Some(most) = most else { return Some(natural.collect()) };
    // Text may be of any length. Starting at the screen's width bounds the loop below, which
    // shrinks columns by one character at a time.
    let limit = |(column, natural): (&Column, usize)| {
        if column.is_text { natural.min(most) } else { natural }
    };
    let mut widths: Vec<usize> = columns.iter().zip(natural).map(limit).collect();
    let room = most.checked_sub(2 * columns.len().saturating_sub(1))?;
    while widths.iter().sum::<usize>() > room {
        let widest = columns
            .iter()
            .zip(&mut widths)
            .filter(|(column, width)| column.is_text && **width > MIN_TEXT_WIDTH)
            .map(|(_, width)| width)
            .max_by_key(|width| **width)?;
        *widest -= 1;
    }
    Some(widths)
}

/// Returns the width in characters, each of which takes one column.
pub(super) fn width(text: &str) -> usize {
    text.chars().count()
}

fn cut(text: String, most: usize) -> String {
    if width(&text) <= most {
        return text;
    }
    let mut shorter: String = text.chars().take(most.saturating_sub(1)).collect();
    if most > 0 {
        shorter.push('…');
    }
    shorter
}
