//! The thread that owns NVML.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use nvml_wrapper::Nvml;
use pool_services::ports::{Inventory, Residency};
use tokio::sync::oneshot;

use crate::error::NvmlError;
use crate::events::{self, Ears};
use crate::hearing::Hearing;
use crate::open::open;
use crate::sample::Sampler;
use crate::shared::Shared;
use crate::watcher::{About, Beat, Pulse};
use crate::{Opening, Options, convert};

/// What is wanted of the thread.
#[derive(Debug)]
pub(crate) enum Question {
    /// Who holds memory now?
    Residency(oneshot::Sender<Residency>),
    /// Look at the devices now.
    Look,
    /// End.
    Stop,
}

/// How the use of the library ended.
enum Ended {
    /// Nobody wants it any more.
    Unwanted,
    /// It failed as a whole.
    Failed(NvmlError),
}

/// Uses the library for as long as somebody wants it, opening it again whenever it failed as a whole.
pub(crate) fn run(
    shared: &Shared,
    asked: &Receiver<Question>,
    beat: &Sender<Beat>,
    nudge: &Sender<Question>,
    options: &Options,
) {
    // To initialise every GPU may take long.
    let opening = Pulse::new(beat, options.open_within);
    let (first, longest) = options.open_again;
    let mut pause = first;
    loop {
        opening.calls(About::Driver);
        let opened = open(options);
        let error = match opened {
            Err(error) => error,
            Ok(nvml) => {
                let deaf = AtomicBool::new(true);
                let (ears, heard) = mpsc::channel();
                let hearing = Hearing::new(ears, &deaf, options.open_again);
                let sampler = Sampler::default();
                let mut session = Session { nvml: &nvml, shared, asked, options, sampler, hearing };
                match session.first(&opening) {
                    Err(error) => error,
                    Ok(()) => {
                        shared.set_opening(Opening::Done);
                        pause = first;
                        match session.run(beat, nudge, heard, &deaf) {
                            Ended::Unwanted => return,
                            Ended::Failed(error) => error,
                        }
                    }
                }
                // Here the library is closed, and no call of it is on its way.
            }
        };
        opening.rests();
        shared.set_opening(Opening::Trying(Some(error.clone())));
        let why = error.to_string();
        shared.publish(|current| failed(current, &why));
        if !answer_for(pause, asked, &why) {
            return;
        }
        pause = (pause * 2).min(longest);
    }
}

fn failed(current: &Inventory, why: &str) -> Inventory {
    Inventory { devices: convert::all_unknown(&current.devices, why), problem: Some(why.to_owned()), ..current.clone() }
}

/// Answers without the library for a time. Says whether anybody still wants it.
fn answer_for(pause: Duration, asked: &Receiver<Question>, why: &str) -> bool {
    let began = tokio::time::Instant::now();
    loop {
        match asked.recv_timeout(pause.saturating_sub(began.elapsed())) {
            Ok(Question::Residency(reply)) => {
                // Who asked may have stopped waiting.
                let _ = reply.send(Residency::Unknown(why.to_owned()));
            }
            Ok(Question::Look) => {}
            Ok(Question::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => return true,
        }
    }
}

/// One use of the library.
struct Session<'nvml> {
    nvml: &'nvml Nvml,
    shared: &'nvml Shared,
    asked: &'nvml Receiver<Question>,
    options: &'nvml Options,
    sampler: Sampler,
    hearing: Hearing<'nvml>,
}

impl<'nvml> Session<'nvml> {
    /// The first look, which may take as long as the opening.
    fn first(&mut self, pulse: &Pulse<'_>) -> Result<(), NvmlError> {
        let now = self.see(pulse)?;
        if now.devices.iter().all(convert::is_nameless) {
            return Err(self.sampler.why_none());
        }
        self.shared.publish(|_| now);
        Ok(())
    }

    fn look(&mut self, pulse: &Pulse<'_>) -> Result<(), NvmlError> {
        let now = self.see(pulse)?;
        self.shared.publish(|_| now);
        Ok(())
    }

    fn see(&mut self, pulse: &Pulse<'_>) -> Result<Inventory, NvmlError> {
        let before = self.shared.last();
        let mut now = self.sampler.inventory(self.nvml, &before.devices, pulse)?;
        // Before anybody knows of a device, and starts something there.
        self.hearing.see_to(self.nvml, &mut self.sampler, pulse);
        self.hearing.note(&mut now.devices);
        pulse.rests();
        Ok(now)
    }

    /// Looks at the devices and answers, until it fails as a whole or nobody wants it any more.
    fn run(
        &mut self,
        beat: &Sender<Beat>,
        nudge: &Sender<Question>,
        heard: Receiver<Ears<'nvml>>,
        deaf: &AtomicBool,
    ) -> Ended {
        let (nvml, shared) = (self.nvml, self.shared);
        let pulse = Pulse::new(beat, self.options.answer_within);
        // The end waits for the events' thread, which may be inside a wait: the library must outlive both.
        thread::scope(|scope| {
            let listening = thread::Builder::new()
                .name("nvml-events".to_owned())
                .spawn_scoped(scope, move || events::listen(nvml, &heard, deaf, shared, nudge));
            if let Err(error) = listening {
                return Ended::Failed(NvmlError::Other(format!("its thread did not start: {error}")));
            }
            let ended = self.rounds(&pulse);
            self.hearing.end();
            pulse.calls(About::Driver);
            ended
        })
    }

    fn rounds(&mut self, pulse: &Pulse<'_>) -> Ended {
        loop {
            pulse.rests();
            let asks = match self.asked.recv_timeout(self.options.sample_every) {
                // The one who asked may have stopped waiting while a call blocked.
                Ok(Question::Residency(reply)) => Some(reply).filter(|reply| !reply.is_closed()),
                Ok(Question::Look) | Err(RecvTimeoutError::Timeout) => None,
                Ok(Question::Stop) | Err(RecvTimeoutError::Disconnected) => return Ended::Unwanted,
            };
            // Before an answer too: whoever asks compares it with the inventory, and must not keep that from being renewed.
            if let Err(error) = self.look(pulse) {
                return Ended::Failed(error);
            }
            if let Some(reply) = asks {
                let _ = reply.send(self.sampler.residency(self.nvml, pulse));
            }
        }
    }
}
