//! The thread that waits for events. It makes no other call: which devices it hears is set up by the thread that makes them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::error::NvmlError as Raw;
use nvml_wrapper::{Device, EventSet, Nvml};
use pool_domain::DeviceSnapshot;
use pool_domain::charges::Said;
use pool_domain::echo::Source;
use pool_services::ports::{Incident, Reach};

use crate::raw;
use crate::shared::Shared;
use crate::worker::Question;

/// One wait, in milliseconds: the thread ends no later than this after it is told to.
const SLICE: u32 = 1_000;

/// Kinds that nvml-wrapper has no name for: the device cannot be used, and what has to be done about it changed.
const UNAVAILABLE: u64 = 0x4000;
const RECOVERY: u64 = 0x8000;

/// A set of events, and the GPUs of it by their handles.
#[derive(Debug)]
pub(crate) struct Ears<'nvml> {
    set: EventSet<'nvml>,
    gpus: BTreeMap<usize, String>,
}

impl<'nvml> Ears<'nvml> {
    /// Hears of these GPUs whatever can be told of each. One that has nothing to tell is left out; one that should and fails
    /// is named with why.
    pub(crate) fn new<'d>(
        nvml: &'nvml Nvml,
        gpus: impl Iterator<Item = (&'d Device<'nvml>, &'d str)>,
    ) -> Result<(Self, BTreeMap<String, String>), Raw>
    where
        'nvml: 'd,
    {
        let set = nvml.create_event_set()?;
        let wanted = UNAVAILABLE
            | RECOVERY
            | (EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR | EventTypes::MIG_CONFIG_CHANGE)
                .bits();
        let (mut heard, mut unheard) = (BTreeMap::new(), BTreeMap::new());
        for (device, uuid) in gpus {
            let registered = raw::supported_events(device).and_then(|kinds| match kinds & wanted {
                0 => Err(Raw::NotSupported),
                can => raw::register(device, can, &set),
            });
            match registered {
                Ok(()) => {
                    heard.insert(raw::key(device), uuid.to_owned());
                }
                Err(Raw::NotSupported | Raw::FunctionNotFound | Raw::FailedToLoadSymbol(_)) => {}
                Err(error) => {
                    unheard.insert(uuid.to_owned(), error.to_string());
                }
            }
        }
        Ok((Self { set, gpus: heard }, unheard))
    }

    /// The GPUs it hears of.
    pub(crate) fn gpus(&self) -> impl Iterator<Item = &str> {
        self.gpus.values().map(String::as_str)
    }
}

/// Listens until nobody gives it ears any more. `deaf`: set when it needs new ones.
pub(crate) fn listen<'nvml>(
    nvml: &'nvml Nvml,
    ears: &Receiver<Ears<'nvml>>,
    deaf: &AtomicBool,
    shared: &Shared,
    worker: &Sender<Question>,
) {
    let mut now: Option<Ears<'nvml>> = None;
    loop {
        match ears.try_recv() {
            Ok(newer) => now = Some(newer),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {}
        }
        let Some(hearing) = &now else {
            match ears.recv_timeout(Duration::from_millis(SLICE.into())) {
                Ok(newer) => now = Some(newer),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            continue;
        };
        match raw::wait(nvml, &hearing.set, SLICE) {
            Ok(happened) => {
                if let Some(uuid) = hearing.gpus.get(&happened.key)
                    && let Some(said) = said(happened.kind, happened.data)
                {
                    let (device, reach) = concerned(uuid, happened.instance, &shared.last().devices);
                    shared.tell(Incident { device, reach, said, pid: None, source: Source::Driver });
                }
                // Whatever it was, the devices may look different now. Who makes the calls may be inside one.
                let _ = worker.send(Question::Look);
            }
            Err(Raw::Timeout) => {}
            Err(error) => {
                tracing::debug!(%error, "events of the GPUs are not heard");
                now = None;
                deaf.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// What was said, if it is something that is not seen in the devices themselves.
fn said(kind: u64, data: u64) -> Option<Said> {
    if kind & EventTypes::CRITICAL_XID_ERROR.bits() != 0 {
        Some(Said::Xid(data))
    } else if kind & EventTypes::DOUBLE_BIT_ECC_ERROR.bits() != 0 {
        Some(Said::DoubleBitEcc)
    } else {
        None
    }
}

/// The slice that an event is about, if it is about one that is known, else the GPU, with how much of it.
pub(crate) fn concerned(gpu: &str, instance: Option<(u32, u32)>, devices: &[DeviceSnapshot]) -> (String, Reach) {
    let slice = instance.and_then(|(gi, ci)| {
        devices.iter().find(|d| {
            let here = d.mig.as_ref().is_some_and(|m| m.parent == gpu);
            here && d.details.instance.is_some_and(|(g, c)| g == gi && (c == ci || ci == u32::MAX))
        })
    });
    match slice {
        Some(slice) => (slice.uuid.clone(), Reach::Device),
        None if instance.is_some() => (gpu.to_owned(), Reach::UnknownSlice),
        None => (gpu.to_owned(), Reach::Device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_and_what_is_seen() {
        assert_eq!(said(8, 79), Some(Said::Xid(79)));
        assert_eq!(said(2, 0), Some(Said::DoubleBitEcc));
        assert_eq!((said(0x100, 0), said(RECOVERY, 1)), (None, None));
    }
}
