//! A bar on the terminal while a command waits: what is being done, how fast, and how long it will take.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pool_services::ports::StagingStep;
use pool_services::{Operation, PoolSnapshot};

/// Between two pictures.
pub(crate) const PICTURE: Duration = Duration::from_millis(250);

const BYTES_OF: &str = "{spinner} {prefix}: {msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
const BYTES: &str = "{spinner} {prefix}: {msg} {bytes}, {bytes_per_sec}";
const PERCENT: &str = "{spinner} {prefix}: {msg} {wide_bar} {percent} %, {eta} left";
const WORDS: &str = "{spinner} {prefix}: {wide_msg} {elapsed}";

/// What there is to show of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Picture {
    /// Bytes of a model.
    Bytes { step: &'static str, done: u64, total: Option<u64> },
    /// Percent of a model that its engine has loaded.
    Percent(u8),
    /// Words alone.
    Words(String),
}

fn picture(pool: &PoolSnapshot, operation: &Operation) -> Picture {
    if let Some(staging) = pool.replicas.iter().find_map(|r| r.staging) {
        let step = match staging.step {
            StagingStep::Waiting => "waiting for another fetch of the model",
            StagingStep::Fetching => "fetching the model",
            StagingStep::Verifying => "verifying the model",
        };
        return Picture::Bytes { step, done: staging.done, total: staging.total };
    }
    if let Some(percent) = pool.replicas.iter().filter_map(|r| r.loaded_percent).min() {
        return Picture::Percent(percent);
    }
    Picture::Words(operation.progress.clone())
}

/// The bar. It is gone when it is dropped, so that the outcome stands alone.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Progress {
    /// On standard error, which has to be a terminal.
    pub(crate) fn begin() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let begun = Self { bar };
        begun.set_style(WORDS);
        begun.bar.enable_steady_tick(PICTURE);
        begun
    }

    /// How a pool is now.
    pub(crate) fn show(&self, pool: &PoolSnapshot, operation: &Operation) {
        let what = format!("{} of {}", operation.verb, operation.pool_id);
        let (template, message) = match picture(pool, operation) {
            Picture::Bytes { step, done, total } => {
                self.reach(done, total);
                (if total.is_some() { BYTES_OF } else { BYTES }, step.to_owned())
            }
            Picture::Percent(percent) => {
                self.reach(percent.into(), Some(100));
                (PERCENT, "the engine loads".to_owned())
            }
            Picture::Words(words) => (WORDS, words),
        };
        self.set_style(template);
        self.bar.set_prefix(what);
        self.bar.set_message(message);
    }

    fn set_style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }

    fn reach(&self, done: u64, total: Option<u64>) {
        // Something else begins: what was measured so far says nothing about it.
        if self.bar.length() != total {
            match total {
                Some(total) => self.bar.set_length(total),
                None => self.bar.unset_length(),
            }
            self.bar.reset_eta();
        }
        self.bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_of_the_form() {
        for template in [BYTES_OF, BYTES, PERCENT, WORDS] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
