//! The GPU port over NVML, NVIDIA's driver library.
//!
//! NVML calls can block for minutes while a GPU is in trouble. So one thread owns NVML and makes every call, one at a
//! time; a second watches it and marks the inventory as old when it goes silent; nobody else ever waits on NVML for
//! longer than [`ANSWER_WITHIN`].

#![forbid(unsafe_code)]

mod convert;
mod error;
mod sample;
mod worker;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use pool_services::ports::{GpuProbe, Inventory, Residency};
use tokio::sync::{oneshot, watch};

pub use crate::error::NvmlError;
use crate::worker::Question;

/// How often the devices are looked at.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// How long the driver may take before it counts as silent.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long the driver may take to initialise every GPU. Without persistence mode that is seconds for each.
pub const OPEN_WITHIN: Duration = Duration::from_secs(60);

/// The GPUs of this node as the driver reports them. Dropping it stops its threads.
#[derive(Debug)]
pub struct NvmlGpus {
    inventory: watch::Sender<Inventory>,
    // The thread ends when this end of the channel is gone. It is not joined: it may be inside a call that blocks.
    questions: mpsc::Sender<Question>,
}

impl NvmlGpus {
    /// Loads the driver library and takes the first inventory. Blocks the calling thread for up to [`OPEN_WITHIN`].
    ///
    /// # Errors
    /// When there is no usable driver or no GPU; [`NvmlError::hint`] says what to do.
    pub fn open() -> Result<Self, NvmlError> {
        let inventory = watch::Sender::new(Inventory::default());
        let (questions, asked) = mpsc::channel();
        let (opened, open) = mpsc::channel();
        let published = inventory.clone();
        thread::Builder::new()
            .name("nvml".to_owned())
            .spawn(move || worker::run(&published, &asked, &opened))
            .map_err(|e| NvmlError::Other(format!("its thread did not start: {e}")))?;
        match open.recv_timeout(OPEN_WITHIN) {
            Ok(result) => result?,
            Err(mpsc::RecvTimeoutError::Timeout) => return Err(NvmlError::Silent),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(NvmlError::Other("its thread ended".to_owned()));
            }
        }
        Ok(Self { inventory, questions })
    }
}

#[async_trait]
impl GpuProbe for NvmlGpus {
    fn inventory(&self) -> watch::Receiver<Inventory> {
        self.inventory.subscribe()
    }

    async fn residency(&self) -> Residency {
        ask(&self.questions).await
    }
}

async fn ask(questions: &mpsc::Sender<Question>) -> Residency {
    let (reply, answer) = oneshot::channel();
    if questions.send(Question { reply }).is_err() {
        return Residency::Unknown("the NVML thread ended".to_owned());
    }
    match tokio::time::timeout(ANSWER_WITHIN, answer).await {
        Ok(Ok(residency)) => residency,
        Ok(Err(_)) => Residency::Unknown("the NVML thread ended".to_owned()),
        Err(_) => Residency::Unknown(worker::silent()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_driver_library_it_says_so_at_once() {
        match NvmlGpus::open() {
            // This machine has GPUs.
            Ok(gpus) => assert!(!gpus.inventory().borrow().devices.is_empty()),
            Err(error) => {
                assert!(!error.hint().is_empty());
                if let NvmlError::LibraryMissing(_) = &error {
                    assert!(error.hint().contains("install the NVIDIA driver"), "{}", error.hint());
                    assert!(error.hint().contains("backend = \"simulated\""));
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_never_answers_leaves_residency_unknown() {
        let (questions, asked) = mpsc::channel();
        assert_eq!(ask(&questions).await, Residency::Unknown(worker::silent()));
        drop(asked);
        assert!(matches!(ask(&questions).await, Residency::Unknown(why) if why.contains("ended")));
    }
}
