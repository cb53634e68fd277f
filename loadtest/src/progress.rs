//! What a run says while it goes on: a live line at a terminal, a plain line now and then elsewhere.
//!
//! Knows the terminal. Must not know what it shows.

use std::{
    fmt::Display,
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use tokio::time::Instant;

/// The display of a run, on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    spoken: Mutex<Spoken>,
}

#[derive(Debug)]
struct Spoken {
    step: &'static str,
    at: Instant,
}

impl Progress {
    /// A display that shows everything.
    #[must_use]
    pub fn new() -> Self {
        Self::with_target(
            ProgressDrawTarget::stderr_with_hz(DRAWS_PER_S),
            stderr().is_terminal(),
        )
    }

    /// A display that shows nothing, for tests.
    #[must_use]
    pub fn silent() -> Self {
        Self::with_target(ProgressDrawTarget::hidden(), true)
    }

    fn with_target(target: ProgressDrawTarget, is_terminal: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        Self {
            bar,
            is_terminal,
            spoken: Mutex::new(Spoken {
                step: "",
                at: Instant::now(),
            }),
        }
    }

    /// A line that stays.
    pub fn say(&self, line: impl Display) {
        if self.is_terminal {
            // Asked before: the bar is locked while it is suspended.
            let is_shown = !self.bar.is_hidden();
            self.bar.suspend(|| print_line(is_shown, &line));
        } else {
            print_line(true, &line);
        }
    }

    /// Begins a step of `total` things, or of an unknown number.
    pub fn begin(&self, step: &'static str, total: Option<u64>) {
        *self.spoken.lock() = Spoken {
            step,
            at: Instant::now(),
        };
        self.bar.reset();
        match total {
            Some(total) => {
                self.bar.set_style(style(
                    "  {prefix:<10} {bar:24.green/dim} {human_pos} of {human_len}  {wide_msg}",
                ));
                self.bar.set_length(total);
            }
            None => {
                self.bar.set_style(style(
                    "  {prefix:<10} {spinner:.green} {human_pos} in {elapsed}  {wide_msg}",
                ));
                self.bar.unset_length();
            }
        }
        self.bar.set_prefix(step);
        self.bar.set_message("");
        if !self.is_terminal {
            print_line(true, &format_args!("  {step}"));
        }
    }

    /// How far the step is, and what else is to be seen now.
    pub fn at(&self, done: u64, live: impl FnOnce() -> String) {
        if self.is_terminal {
            self.bar.set_position(done);
            self.bar.set_message(live());
            return;
        }
        let mut spoken = self.spoken.lock();
        if PLAIN_LINE_INTERVAL <= spoken.at.elapsed() {
            spoken.at = Instant::now();
            print_line(true, &format_args!("  {}  {done}  {}", spoken.step, live()));
        }
    }

    /// Takes the live line away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .map(|style| style.progress_chars("━━─"))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[expect(clippy::print_stderr, reason = "this is the display")]
fn print_line(is_shown: bool, line: &impl Display) {
    if is_shown {
        eprintln!("{line}");
    }
}

const DRAWS_PER_S: u8 = 10;
const PLAIN_LINE_INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_display_takes_everything_and_returns() {
        let progress = Progress::silent();
        progress.begin("sending", Some(2));
        progress.at(1, || "half".to_owned());
        progress.say("a line");
        progress.begin("waiting", None);
        progress.end();
    }
}
