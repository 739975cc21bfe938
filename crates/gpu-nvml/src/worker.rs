//! The thread that owns NVML, and the one that watches it.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;

use nvml_wrapper::Nvml;
use pool_services::ports::{Inventory, Residency};
use tokio::sync::{oneshot, watch};
use tracing::warn;

use crate::error::NvmlError;
use crate::{ANSWER_WITHIN, SAMPLE_EVERY, convert, sample};

/// Who holds memory now?
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) reply: oneshot::Sender<Residency>,
}

/// What is said of a driver that does not answer.
pub(crate) fn silent() -> String {
    format!("the NVIDIA driver has not answered for {} s", ANSWER_WITHIN.as_secs())
}

/// Opens NVML, tells how that went, then samples until nobody is left to ask.
pub(crate) fn run(
    inventory: &watch::Sender<Inventory>,
    asked: &Receiver<Question>,
    opened: &Sender<Result<(), NvmlError>>,
) {
    let nvml = match open(inventory) {
        Ok(nvml) => nvml,
        Err(error) => {
            // Whoever opened may have given up waiting.
            let _ = opened.send(Err(error));
            return;
        }
    };
    let (alive, heard) = mpsc::channel();
    let watched = inventory.clone();
    let watcher = thread::Builder::new().name("nvml-watch".to_owned()).spawn(move || watch(&watched, &heard));
    if let Err(error) = watcher {
        let _ = opened.send(Err(NvmlError::Other(format!("its watcher did not start: {error}"))));
        return;
    }
    if opened.send(Ok(())).is_err() {
        return;
    }
    loop {
        match asked.recv_timeout(SAMPLE_EVERY) {
            Ok(question) => {
                // The one who asked may have stopped waiting while a call blocked.
                if !question.reply.is_closed() {
                    let _ = question.reply.send(sample::residency(&nvml));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        // After an answer too: whoever asks often must not keep the inventory from being renewed.
        // Copied first: a borrow held during the calls would block the watcher.
        let before = inventory.borrow().devices.clone();
        let now = sample::inventory(&nvml, &before);
        publish(inventory, now);
        if alive.send(()).is_err() {
            return;
        }
    }
}

fn open(inventory: &watch::Sender<Inventory>) -> Result<Nvml, NvmlError> {
    let nvml = Nvml::init()?;
    if nvml.device_count()? == 0 {
        return Err(NvmlError::NoDevice);
    }
    let first = sample::inventory(&nvml, &[]);
    if first.devices.is_empty() {
        // Counted, but every one of them is kept from us.
        return Err(NvmlError::NoPermission);
    }
    publish(inventory, first);
    Ok(nvml)
}

/// Marks everything as unknown whenever nothing was heard for too long. Ends with the thread it watches.
fn watch(inventory: &watch::Sender<Inventory>, heard: &Receiver<()>) {
    loop {
        match heard.recv_timeout(ANSWER_WITHIN) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => mark_silent(inventory),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn mark_silent(inventory: &watch::Sender<Inventory>) {
    inventory.send_if_modified(|current| {
        let devices = convert::all_unknown(&current.devices, &silent());
        let now = Inventory { devices, problem: Some(silent()), ..current.clone() };
        replace(current, now)
    });
}

fn publish(inventory: &watch::Sender<Inventory>, now: Inventory) {
    inventory.send_if_modified(|current| replace(current, now));
}

/// Takes over what is new and says whether anything is; tells of a new problem once.
fn replace(current: &mut Inventory, now: Inventory) -> bool {
    if let Some(problem) = now.problem.as_deref().filter(|_| current.problem != now.problem) {
        warn!(problem, "the GPUs cannot be read");
    }
    let changed = *current != now;
    *current = now;
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_and_told_once() {
        let inventory = watch::Sender::new(Inventory::default());
        let mut seen = inventory.subscribe();
        mark_silent(&inventory);
        assert!(seen.has_changed().unwrap());
        assert_eq!(seen.borrow_and_update().problem, Some(silent()));
        mark_silent(&inventory);
        assert!(!seen.has_changed().unwrap());
    }

    #[test]
    fn the_watcher_ends_with_the_thread_it_watches() {
        let inventory = watch::Sender::new(Inventory::default());
        let (alive, heard) = mpsc::channel();
        alive.send(()).unwrap();
        drop(alive);
        watch(&inventory, &heard);
        assert_eq!(inventory.borrow().problem, None);
    }
}
