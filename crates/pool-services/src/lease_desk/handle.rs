//! How others speak with the desk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pool_domain::lease_book::{At, LeaseId};
use pool_domain::liveness::Signals;
use pool_domain::{Generation, Holder, ReplicaKey};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::admission::SlotGuard;
use crate::control::ControlError;
use crate::lease::{Lease, LeaseRequest};
use crate::tally::Tally;

pub(super) type Granted<T> = Result<T, ControlError>;
pub(super) type Guarded = (ReplicaKey, SlotGuard);

/// What the desk is told.
#[derive(Debug)]
pub(super) enum DeskCommand {
    Lease { request: LeaseRequest, answer: oneshot::Sender<Granted<Lease>> },
    Guard { wait: Duration, holder: Holder, answer: oneshot::Sender<Granted<Guarded>> },
    Renew { id: LeaseId, ttl: Option<Duration>, holder: Holder, answer: oneshot::Sender<Granted<Lease>> },
    Release { id: LeaseId, answer: oneshot::Sender<Granted<()>> },
    List { answer: oneshot::Sender<Vec<Lease>> },
    Adopted { at: At, guards: Vec<SlotGuard> },
    Busy { at: At, work: Option<Signals>, left: oneshot::Sender<u16> },
}

/// The desk of a pool.
#[derive(Debug, Clone)]
pub(crate) struct Desk {
    pub(super) commands: mpsc::Sender<DeskCommand>,
    /// Rung by the admission words.
    pub(crate) bell: Arc<Notify>,
    /// Rung when somebody who waited is gone.
    pub(super) gone: Arc<Notify>,
    pub(super) waiting: Arc<AtomicU32>,
    /// Guards, whether they had to wait or not.
    pub(crate) tally: Arc<Tally>,
}

fn stopping<E>(_: E) -> ControlError {
    ControlError::Unreachable("the daemon is stopping".into())
}

/// The wait for an answer. Who drops it is gone, and loses what it may have been granted meanwhile.
struct Asked<'a, T: Send + 'static> {
    desk: &'a Desk,
    answer: oneshot::Receiver<Granted<T>>,
    /// What becomes of a grant that nobody took.
    give_back: fn(&Desk, &T),
}

impl<T: Send + 'static> Drop for Asked<'_, T> {
    fn drop(&mut self) {
        self.answer.close();
        self.desk.gone.notify_one();
        if let Ok(Ok(granted)) = self.answer.try_recv() {
            (self.give_back)(self.desk, &granted);
        }
    }
}

impl Desk {
    /// Wishes that wait.
    pub(crate) fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    async fn ask<T: Send + 'static>(
        &self,
        give_back: fn(&Desk, &T),
        command: impl FnOnce(oneshot::Sender<Granted<T>>) -> DeskCommand,
    ) -> Granted<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(stopping)?;
        let mut asked = Asked { desk: self, answer: answered, give_back };
        (&mut asked.answer).await.map_err(stopping)?
    }

    pub(crate) async fn lease(&self, request: LeaseRequest) -> Granted<Lease> {
        // Who asked with a key comes back for it; without, nobody knows the lease.
        let give_back = if request.key.is_some() { |_: &Self, _: &Lease| {} } else { Self::give_back };
        self.ask(give_back, |answer| DeskCommand::Lease { request, answer }).await
    }

    fn give_back(&self, lease: &Lease) {
        let (Ok(id), Ok(runtime)) = (lease.id.parse(), tokio::runtime::Handle::try_current()) else { return };
        let desk = self.clone();
        runtime.spawn(async move { desk.release(id).await });
    }

    pub(crate) async fn guard(&self, wait: Duration, holder: &Holder) -> Granted<Guarded> {
        let holder = holder.clone();
        // A guard gives itself back.
        self.ask(|_, _| {}, |answer| DeskCommand::Guard { wait, holder, answer }).await
    }

    pub(crate) async fn renew(&self, id: LeaseId, ttl: Option<Duration>, holder: Holder) -> Granted<Lease> {
        self.ask(|_, _| {}, |answer| DeskCommand::Renew { id, ttl, holder, answer }).await
    }

    pub(crate) async fn release(&self, id: LeaseId) -> Granted<()> {
        self.ask(|_, _| {}, |answer| DeskCommand::Release { id, answer }).await
    }

    pub(crate) async fn list(&self) -> Vec<Lease> {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(DeskCommand::List { answer }).await.is_err() {
            return Vec::new();
        }
        answered.await.unwrap_or_default()
    }

    /// An engine of an earlier daemon serves on, with slots of which nobody knows who uses them.
    pub(crate) async fn adopted(&self, at: At, guards: Vec<SlotGuard>) {
        let _ = self.commands.send(DeskCommand::Adopted { at, guards }).await;
    }

    /// It works on this, if it says. Returns how many of its slots still count as taken.
    pub(crate) async fn busy(&self, at: At, work: Option<Signals>) -> u16 {
        let (left, answered) = oneshot::channel();
        if self.commands.send(DeskCommand::Busy { at, work, left }).await.is_err() {
            return 0;
        }
        answered.await.unwrap_or(0)
    }
}

/// Which slots are meant.
pub(crate) fn at(key: &ReplicaKey, generation: Generation) -> At {
    At { replica: key.replica, generation }
}
