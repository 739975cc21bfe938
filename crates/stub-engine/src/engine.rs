//! What the running engine knows: how far it has loaded, its slots, its counters.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use crate::args::Args;
use crate::death::Death;
use crate::faults;

/// The state every handler shares.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) args: Args,
    pub(crate) counters: Counters,
    started: Instant,
    slots: Box<[SlotState]>,
    /// One permit for each slot that is not busy; waiters are served in order.
    free: Arc<Semaphore>,
    arrived: AtomicU64,
    deaths: mpsc::UnboundedSender<Death>,
}

/// How far the request in a slot has come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    pub(crate) task: u64,
    pub(crate) prompt: u64,
    pub(crate) decoded: u64,
}

/// The same as the slot keeps it; a task of 0 means that there is none.
#[derive(Debug, Default)]
struct SlotState {
    task: AtomicU64,
    prompt: AtomicU64,
    decoded: AtomicU64,
}

impl SlotState {
    fn progress(&self) -> Option<Progress> {
        let [task, prompt, decoded] = [&self.task, &self.prompt, &self.decoded].map(|n| n.load(Relaxed));
        (task > 0).then_some(Progress { task, prompt, decoded })
    }

    /// Takes the slot, if it is free.
    fn begin(&self, task: u64) -> bool {
        let free = self.task.compare_exchange(0, task, Relaxed, Relaxed).is_ok();
        if free {
            self.prompt.store(0, Relaxed);
            self.decoded.store(0, Relaxed);
        }
        free
    }
}

/// What `/metrics` counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) predicted_tokens: AtomicU64,
    pub(crate) predicted_micros: AtomicU64,
    pub(crate) deferred: AtomicU64,
}

/// What `/health` is to say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Health {
    Loading { progress: f64 },
    Ok,
    Unhealthy,
}

impl Engine {
    /// An engine that starts to load now. A crash some request asks for comes out of the receiver.
    pub(crate) fn new(args: Args) -> (Arc<Self>, mpsc::UnboundedReceiver<Death>) {
        let (deaths, receiver) = mpsc::unbounded_channel();
        let slots = args.slots as usize;
        let engine = Self {
            args,
            counters: Counters::default(),
            started: Instant::now(),
            slots: (0..slots).map(|_| SlotState::default()).collect(),
            free: Arc::new(Semaphore::new(slots)),
            arrived: AtomicU64::new(0),
            deaths,
        };
        (Arc::new(engine), receiver)
    }

    pub(crate) fn health(&self) -> Health {
        let elapsed = self.started.elapsed();
        let load = Duration::from_millis(self.args.load_ms);
        let Some(ready_for) = elapsed.checked_sub(load) else {
            return Health::Loading { progress: elapsed.as_secs_f64() / load.as_secs_f64() };
        };
        match self.args.unhealthy_after_ms {
            Some(after) if ready_for >= Duration::from_millis(after) => Health::Unhealthy,
            _ => Health::Ok,
        }
    }

    /// When it began to load.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Context of one slot, divided as llama-server divides it.
    pub(crate) fn slot_context(&self) -> u32 {
        (self.args.ctx_size / self.args.slots).max(1)
    }

    /// How far the request of each slot has come, in order.
    pub(crate) fn progress(&self) -> impl Iterator<Item = Option<Progress>> {
        self.slots.iter().map(SlotState::progress)
    }

    /// Takes in a request that needs the model: waits for a slot, or runs into the fault that was asked for.
    pub(crate) async fn admit(self: &Arc<Self>) -> Slot {
        let number = self.arrived.fetch_add(1, Relaxed) + 1;
        if self.args.crash_on_request == Some(number) {
            // If nobody listens the process is already on its way out.
            let _ = self.deaths.send(faults::crash(&self.args));
            pending::<()>().await;
        }
        let slot = self.slot(number).await;
        if self.args.hang_after_requests.is_some_and(|good| number > good) {
            // A decode that hangs keeps its slot even when the client has long gone.
            tokio::spawn(async move {
                let _slot = slot;
                pending::<()>().await;
            });
            return pending().await;
        }
        slot
    }

    async fn slot(self: &Arc<Self>, task: u64) -> Slot {
        let free = Arc::clone(&self.free);
        let permit = match Arc::clone(&free).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let _deferred = Deferred::count(&self.counters.deferred);
                match free.acquire_owned().await {
                    Ok(permit) => permit,
                    // The semaphore is never closed.
                    Err(_) => pending().await,
                }
            }
        };
        let index = self.slots.iter().position(|slot| slot.begin(task)).unwrap_or(0);
        Slot { engine: Arc::clone(self), index, _permit: permit }
    }
}

impl Slot {
    /// Notes how far its request has come.
    pub(crate) fn come_to(&self, prompt: u64, decoded: u64) {
        let slot = &self.engine.slots[self.index];
        slot.prompt.store(prompt, Relaxed);
        slot.decoded.store(decoded, Relaxed);
    }
}

/// One busy slot; free again on drop, also when the client goes away.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) engine: Arc<Engine>,
    pub(crate) index: usize,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Before the permit, which is dropped after this: whoever gets it finds a free slot.
        self.engine.slots[self.index].task.store(0, Relaxed);
    }
}

struct Deferred<'a>(&'a AtomicU64);

impl<'a> Deferred<'a> {
    fn count(counter: &'a AtomicU64) -> Self {
        counter.fetch_add(1, Relaxed);
        Self(counter)
    }
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
