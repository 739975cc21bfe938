//! Watches the thread that makes the calls. One that does not come back in time makes its device unknown, and what is known
//! of all others old: nothing new starts, and nothing that runs is touched.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use pool_services::ports::Inventory;

use crate::convert;
use crate::shared::Shared;

/// What a call is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum About {
    /// The driver as a whole.
    Driver,
    /// The device of this UUID.
    Device(String),
}

/// What the thread that makes the calls is doing.
#[derive(Debug)]
pub(crate) enum Beat {
    /// It makes calls about something, which may take this long.
    Calls(About, Duration),
    /// It makes none.
    Rests,
}

/// Tells what is being done. Nobody listens only when everything ends.
#[derive(Debug)]
pub(crate) struct Pulse<'a> {
    beat: &'a Sender<Beat>,
    pub(crate) within: Duration,
}

impl<'a> Pulse<'a> {
    pub(crate) fn new(beat: &'a Sender<Beat>, within: Duration) -> Self {
        Self { beat, within }
    }

    pub(crate) fn calls(&self, about: About) {
        let _ = self.beat.send(Beat::Calls(about, self.within));
    }

    pub(crate) fn rests(&self) {
        let _ = self.beat.send(Beat::Rests);
    }
}

/// What is said of a driver that does not answer.
pub(crate) fn silent(within: Duration) -> String {
    format!("the NVIDIA driver has not answered for {:.0?}", within)
}

/// Ends with the thread it watches.
pub(crate) fn run(shared: &Shared, beats: &Receiver<Beat>) {
    let mut doing = Beat::Rests;
    loop {
        let heard = match &doing {
            Beat::Rests => beats.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Beat::Calls(_, within) => beats.recv_timeout(*within),
        };
        match (heard, &doing) {
            (Ok(beat), _) => doing = beat,
            (Err(RecvTimeoutError::Timeout), Beat::Calls(about, within)) => {
                shared.publish(|current| silenced(current, about, *within));
                // Said once; it goes on when the call returns.
                match beats.recv() {
                    Ok(beat) => doing = beat,
                    Err(_) => return,
                }
            }
            (Err(_), _) => return,
        }
    }
}

fn silenced(current: &Inventory, about: &About, within: Duration) -> Inventory {
    let problem = match about {
        About::Driver => silent(within),
        About::Device(uuid) => {
            let index = current.devices.iter().find(|d| d.uuid == *uuid).map(|d| format!("GPU {}", d.index));
            format!("{} about {}", silent(within), index.unwrap_or_else(|| uuid.clone()))
        }
    };
    let devices = match about {
        About::Driver => convert::all_unknown(&current.devices, &problem),
        About::Device(uuid) => convert::one_silent(&current.devices, uuid, &silent(within), &problem),
    };
    Inventory { devices, problem: Some(problem), ..current.clone() }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn silence_is_told_once_for_each_call() {
        let shared = Shared::default();
        let (beat, beats) = mpsc::channel();
        beat.send(Beat::Calls(About::Driver, SOON)).unwrap();
        let watching = shared.clone();
        let watcher = std::thread::spawn(move || run(&watching, &beats));
        let mut seen = shared.inventory();
        while seen.borrow_and_update().problem != Some(silent(SOON)) {
            std::thread::yield_now();
        }
        beat.send(Beat::Rests).unwrap();
        drop(beat);
        watcher.join().unwrap();
        assert!(!seen.has_changed().unwrap());
    }
}
