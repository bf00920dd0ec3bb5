//! Progress on standard error: a bar on a terminal, else a line a second.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::{Stage, Update};

/// Lines come at most this often, but for the first of a stage.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

/// Where updates are shown.
#[derive(Debug)]
pub enum Display {
    /// A bar that is drawn over itself.
    Bar(ProgressBar),
    /// Plain lines.
    Lines(Pace),
    /// Nothing.
    Quiet,
}

impl Display {
    /// What suits standard error.
    pub fn new(quiet: bool) -> Self {
        if quiet {
            return Self::Quiet;
        }
        if !io::stderr().is_terminal() {
            return Self::Lines(Pace::default());
        }
        let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
        // The template is a constant, so that a failure to read it would show in the first run.
        if let Ok(style) = ProgressStyle::with_template("{prefix:8} {wide_bar} {percent:>3}% {msg}") {
            bar.set_style(style);
        }
        Self::Bar(bar)
    }

    /// Shows `update`.
    pub fn show(&mut self, update: &Update) {
        match self {
            Self::Bar(bar) => {
                bar.set_prefix(update.stage.as_str());
                bar.set_message(words(update));
                bar.set_position(update.percent.into());
            }
            Self::Lines(pace) => {
                if pace.allows(update.stage, Instant::now()) {
                    let line =
                        format!("{:>3}% {:8} {}", update.percent, update.stage.as_str(), words(update));
                    eprintln!("{}", line.trim_end());
                }
            }
            Self::Quiet => {}
        }
    }

    /// Says something beside the progress.
    pub fn note(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Self::Lines(_) => eprintln!("{text}"),
            Self::Quiet => {}
        }
    }

    /// Removes the bar, so that what follows stands alone.
    pub fn close(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// Where the job stands and how long it will take, as far as there is something to say.
fn words(update: &Update) -> String {
    let words = if update.message == update.stage.as_str() { "" } else { update.message.as_str() };
    match update.eta_s {
        Some(s) => format!("{words}, {}:{:02} left", s / 60, s % 60),
        None => words.to_string(),
    }
}

/// Keeps lines apart.
#[derive(Debug, Default)]
pub struct Pace {
    last: Option<(Stage, Instant)>,
}

impl Pace {
    fn allows(&mut self, stage: Stage, now: Instant) -> bool {
        let early = self.last.is_some_and(|(_, at)| now.saturating_duration_since(at) < BETWEEN_LINES);
        // Denoising and decoding alternate, which must not count as a change each time.
        let furthest = self.last.is_none_or(|(before, _)| stage > before);
        if early && !furthest {
            return false;
        }
        let stage = self.last.map_or(stage, |(before, _)| before.max(stage));
        self.last = Some((stage, now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_once_a_second_and_once_per_stage() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut at = |stage, ms| pace.allows(stage, start + Duration::from_millis(ms));
        assert!(at(Stage::Fetch, 0));
        assert!(!at(Stage::Fetch, 10));
        assert!(at(Stage::Denoise, 20));
        assert!(!at(Stage::Denoise, 500));
        assert!(at(Stage::Decode, 600));
        assert!(!at(Stage::Denoise, 700) && !at(Stage::Decode, 800));
        assert!(at(Stage::Denoise, 1700));
    }
}
