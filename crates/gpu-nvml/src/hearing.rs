//! Sees to it that every GPU is heard of, and knows of which it is not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use nvml_wrapper::Nvml;
use pool_domain::DeviceSnapshot;
use tokio::time::Instant;

use crate::error::NvmlError;
use crate::events::Ears;
use crate::sample::Sampler;
use crate::watcher::{About, Pulse};

/// The end of the calls' thread at which events are asked for.
#[derive(Debug)]
pub(crate) struct Hearing<'nvml> {
    /// To the thread that waits for them; it ends with this.
    ears: Option<Sender<Ears<'nvml>>>,
    /// It needs new ones.
    deaf: &'nvml AtomicBool,
    /// GPUs that should be heard of and are not, by UUID, with why.
    unheard: BTreeMap<String, String>,
    /// When that is tried again, and the pause before.
    again: Option<(Instant, Duration)>,
    /// Between two tries, at first and at most.
    pauses: (Duration, Duration),
}

impl<'nvml> Hearing<'nvml> {
    pub(crate) fn new(ears: Sender<Ears<'nvml>>, deaf: &'nvml AtomicBool, pauses: (Duration, Duration)) -> Self {
        Self { ears: Some(ears), deaf, unheard: BTreeMap::new(), again: None, pauses }
    }

    /// Nobody listens any more.
    pub(crate) fn end(&mut self) {
        self.ears = None;
    }

    /// Registers where it is needed: after a change of the GPUs, when who listens asks for it, and again, with ever longer
    /// pauses, for as long as it fails for one of them.
    pub(crate) fn see_to(&mut self, nvml: &'nvml Nvml, sampler: &mut Sampler, pulse: &Pulse<'_>) {
        let due = self.again.is_some_and(|(at, _)| at <= Instant::now());
        let anew = self.deaf.swap(false, Ordering::Relaxed) || sampler.changed();
        if !anew && !due {
            return;
        }
        let unheard = match self.register(nvml, sampler, pulse, anew) {
            Ok(unheard) => unheard,
            Err(error) => {
                tracing::debug!(%error, "events of the GPUs are not heard");
                let why = error.to_string();
                sampler.known().map(|uuid| (uuid.to_owned(), why.clone())).collect()
            }
        };
        for (gpu, why) in unheard.iter().filter(|(gpu, _)| !self.unheard.contains_key(*gpu)) {
            tracing::warn!(gpu, why, "errors of a GPU are not heard");
        }
        for gpu in self.unheard.keys().filter(|gpu| !unheard.contains_key(*gpu)) {
            tracing::info!(gpu, "errors of a GPU are heard again");
        }
        let (first, longest) = self.pauses;
        let pause = self.again.filter(|_| !anew).map_or(first, |(_, pause)| (pause * 2).min(longest));
        self.again = (!unheard.is_empty()).then(|| (Instant::now() + pause, pause));
        self.unheard = unheard;
    }

    fn register(
        &self,
        nvml: &'nvml Nvml,
        sampler: &mut Sampler,
        pulse: &Pulse<'_>,
        anew: bool,
    ) -> Result<BTreeMap<String, String>, NvmlError> {
        let gpus = sampler.gpus(nvml, pulse)?;
        let each = gpus.iter().map(|(device, uuid)| {
            pulse.calls(About::Device(uuid.clone()));
            (device, uuid.as_str())
        });
        let (new, unheard) = Ears::new(nvml, each)?;
        // Ears that hear no more than those in use would only tell some things twice.
        if let Some(ears) = self.ears.as_ref().filter(|_| anew || unheard != self.unheard) {
            tracing::debug!(gpus = new.gpus().count(), "events of the GPUs are heard");
            // Who listens ends only after this end does.
            let _ = ears.send(new);
        }
        Ok(unheard)
    }

    /// Notes it of the devices of which nothing is heard.
    pub(crate) fn note(&self, devices: &mut [DeviceSnapshot]) {
        for device in devices {
            device.details.unheard = self.unheard.get(&device.uuid).cloned();
        }
    }
}
