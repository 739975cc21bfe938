//! The GPU port over NVML, NVIDIA's driver library.
//!
//! NVML calls can block for minutes while a GPU is in trouble. So one thread owns NVML and makes every call, one at a
//! time; a second waits for events; a third watches the first and says of which device it waits for an answer. Nobody
//! else ever waits on NVML for longer than [`Options::answer_within`]. A library that fails as a whole is closed, once its
//! last call has returned, and opened again, so that a driver that was loaded anew is found.

#![deny(unsafe_code)]

mod convert;
mod error;
mod events;
mod hearing;
mod kernel_log;
mod open;
mod peers;
mod raw;
mod sample;
mod shared;
mod watcher;
mod worker;

use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use pool_services::ports::{GpuProbe, Incidents, Inventory, Residency};
use tokio::sync::{oneshot, watch};

pub use crate::error::NvmlError;
use crate::shared::Shared;
use crate::worker::Question;

/// Where the kernel's log is read.
pub const KERNEL_LOG: &str = "/dev/kmsg";

/// How NVML is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// The library; unset: `libnvidia-ml.so.1`, wherever the loader finds it.
    pub library: Option<PathBuf>,
    /// How often the devices are looked at.
    pub sample_every: Duration,
    /// How long the driver may take about one device before it counts as silent.
    pub answer_within: Duration,
    /// How long it may take to initialise every GPU. Without persistence mode that is seconds for each.
    pub open_within: Duration,
    /// Between two tries to open it, at first and at most; doubled in between.
    pub open_again: (Duration, Duration),
    /// The kernel's log, in which XIDs are told too; unset: it is not read.
    pub kernel_log: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            library: None,
            sample_every: Duration::from_secs(1),
            answer_within: Duration::from_secs(5),
            open_within: Duration::from_secs(60),
            open_again: (Duration::from_secs(1), Duration::from_secs(30)),
            kernel_log: Some(PathBuf::from(KERNEL_LOG)),
        }
    }
}

/// Whether the library is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// It was never opened so far; why the last try failed, if there was one.
    Trying(Option<NvmlError>),
    /// It was opened, and found devices.
    Done,
}

/// The GPUs of this node as the driver reports them. Dropping it stops its threads.
#[derive(Debug)]
pub struct NvmlGpus {
    shared: Shared,
    answer_within: Duration,
    // The thread ends when this end of the channel is gone. It is not joined: it may be inside a call that blocks.
    questions: mpsc::Sender<Question>,
    // So does the one that reads the kernel's log, with this.
    _reads_log: mpsc::Sender<()>,
}

impl NvmlGpus {
    /// Starts to open the library, and to look at the devices once that was possible, for as long as this is there. Never
    /// blocks.
    ///
    /// # Errors
    /// When its threads cannot be started.
    pub fn start(options: Options) -> Result<Self, NvmlError> {
        let shared = Shared::default();
        let (questions, asked) = mpsc::channel();
        let (answer_within, inner, nudge) = (options.answer_within, shared.clone(), questions.clone());
        let failed = |e: std::io::Error| NvmlError::Other(format!("its thread did not start: {e}"));
        let (reads_log, wanted) = mpsc::channel();
        if let Some(path) = &options.kernel_log {
            match kernel_log::open(path) {
                Ok(log) => {
                    let told = shared.clone();
                    thread::Builder::new()
                        .name("kernel-log".to_owned())
                        .spawn(move || kernel_log::follow(log, &told, &wanted))
                        .map_err(failed)?;
                }
                // As for most users: the library tells of the same errors.
                Err(error) => {
                    tracing::info!(%error, "the kernel's log is not read: XIDs are heard of the driver alone");
                }
            }
        }
        let (beat, beats) = mpsc::channel();
        let watched = shared.clone();
        thread::Builder::new()
            .name("nvml-watch".to_owned())
            .spawn(move || watcher::run(&watched, &beats))
            .map_err(failed)?;
        thread::Builder::new()
            .name("nvml".to_owned())
            .spawn(move || worker::run(&inner, &asked, &beat, &nudge, &options))
            .map_err(failed)?;
        Ok(Self { shared, answer_within, questions, _reads_log: reads_log })
    }

    /// Whether the library is in use; the receiver is told of every change.
    #[must_use]
    pub fn opening(&self) -> watch::Receiver<Opening> {
        self.shared.opening()
    }
}

impl Drop for NvmlGpus {
    fn drop(&mut self) {
        // Without its thread there is nothing to end.
        let _ = self.questions.send(Question::Stop);
    }
}

#[async_trait]
impl GpuProbe for NvmlGpus {
    fn inventory(&self) -> watch::Receiver<Inventory> {
        self.shared.inventory()
    }

    fn incidents(&self) -> watch::Receiver<Incidents> {
        self.shared.incidents()
    }

    async fn residency(&self) -> Residency {
        ask(&self.questions, self.answer_within).await
    }
}

async fn ask(questions: &mpsc::Sender<Question>, within: Duration) -> Residency {
    let (reply, answer) = oneshot::channel();
    if questions.send(Question::Residency(reply)).is_err() {
        return Residency::Unknown("the NVML thread ended".to_owned());
    }
    match tokio::time::timeout(within, answer).await {
        Ok(Ok(residency)) => residency,
        Ok(Err(_)) => Residency::Unknown("the NVML thread ended".to_owned()),
        Err(_) => Residency::Unknown(watcher::silent(within)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_never_answers_leaves_residency_unknown() {
        let (questions, asked) = mpsc::channel();
        let within = Duration::from_secs(5);
        assert_eq!(ask(&questions, within).await, Residency::Unknown(watcher::silent(within)));
        drop(asked);
        assert!(matches!(ask(&questions, within).await, Residency::Unknown(why) if why.contains("ended")));
    }
}
