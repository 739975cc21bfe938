//! Whether a Ready engine gets on with its work, judged by what was seen of it, a round at a time.
//!
//! What it does for others counts first: tokens, prompt tokens, slots. Only an idle engine is asked to decode. Busy is not
//! dead, and being told to come back later by a busy engine is no failure; but who is busy has to get somewhere.

use std::time::Duration;

use crate::lifecycle::HealthPolicy;
use crate::{Failure, FailureClass, Tick};

/// One request that an engine is working on, as far as it tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotWork {
    /// Its slot.
    pub slot: u32,
    /// Tells it from the request before it in that slot.
    pub task: u64,
    /// Prompt tokens read.
    pub prompt: u64,
    /// Tokens generated.
    pub decoded: u64,
}

/// What an engine says of its work.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signals {
    /// Requests it works on.
    pub running: u32,
    /// Requests that wait for it.
    pub waiting: u32,
    /// Counters of work done (tokens, steps): which ones and in which order is up to the kind.
    pub counters: Vec<u64>,
    /// The running requests, where it tells of each.
    pub slots: Vec<SlotWork>,
    /// Whether anything moves while a long prompt is being read.
    pub prefill_told: bool,
}

/// The answer to the question for that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// It tells.
    Told(Signals),
    /// Its kind tells nothing, or not on this engine.
    Untold,
    /// It did not answer in time.
    Silent,
}

/// Its answer about its health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It says that it serves.
    Serving,
    /// It has too much to do, or says so.
    Overloaded(String),
    /// It says that it is ill, or nobody answers there any more.
    Ill(String),
    /// No answer in time.
    Silent,
}

/// What became of the one unit of work that an idle engine was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Canary {
    /// It did it.
    Done,
    /// It has too much to do: somebody else came first.
    Declined,
    /// It was called off, because a lease came.
    GaveWay,
    /// It failed.
    Failed(Failure),
    /// It was not done in time.
    Silent,
}

/// What a round of questions found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// About its health.
    pub health: Health,
    /// About its work.
    pub work: Work,
    /// Leases held.
    pub leases: u16,
    /// Grows with what comes from it for those who hold them, as far as that passes through here.
    pub flow: u64,
}

/// What follows from a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is well.
    Well,
    /// It is not; how often in a row that may happen, the lifecycle knows.
    Missed(Failure),
    /// Nothing was learnt.
    Open,
}

/// What follows from the answers of a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// They are enough.
    Decided(Verdict),
    /// It is idle: whether it still works is found out only by having it do something.
    AskForWork,
}

/// What a round shows of its work, beside the round before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Motion {
    /// It got somewhere.
    Moved,
    /// There is nothing to do.
    Idle,
    /// It has just got something to do.
    Fresh,
    /// It has something to do and got nowhere.
    Stands,
    /// It does not say.
    Unknown,
}

/// What is remembered of one engine between rounds. A new generation begins anew.
#[derive(Debug, Clone, PartialEq)]
pub struct Liveness {
    /// The newest signals.
    last: Option<Signals>,
    /// The flow of the round before.
    flow: Option<u64>,
    /// When it was last seen to get somewhere, or to have nothing to do.
    moved_at: Tick,
    /// The last canary was not answered; it may occupy a slot still.
    canary_lost: bool,
    /// Canaries in a row that it had no room for.
    declined: u32,
}

impl Liveness {
    /// Begins to watch at `now`.
    #[must_use]
    pub fn new(now: Tick) -> Self {
        Self { last: None, flow: None, moved_at: now, canary_lost: false, declined: 0 }
    }

    /// Takes in the answers of a round that began at `now`.
    pub fn observe(&mut self, round: Round, now: Tick, policy: &HealthPolicy) -> Next {
        let Round { health, work, leases, flow } = round;
        // What its clients get is seen also where its kind tells nothing of its work.
        let flows = self.flow.replace(flow).is_some_and(|before| before != flow);
        let motion = if flows { Motion::Moved } else { self.motion(&work, leases) };
        if !matches!(motion, Motion::Stands | Motion::Unknown) {
            self.moved_at = now;
        }
        if motion == Motion::Moved {
            (self.canary_lost, self.declined) = (false, 0);
        }
        let busy =
            matches!(motion, Motion::Moved | Motion::Fresh | Motion::Stands) || motion == Motion::Unknown && leases > 0;
        let silent = work == Work::Silent;
        if let Work::Told(signals) = work {
            self.last = Some(signals);
        }
        let stands = (motion == Motion::Stands).then(|| self.stands_for(leases, now, policy)).flatten();
        let missed = |class, detail: String| Verdict::Missed(Failure::new(class, detail));
        Next::Decided(match (health, motion) {
            (Health::Ill(why), _) => missed(FailureClass::Health, why),
            (Health::Serving | Health::Overloaded(_) | Health::Silent, Motion::Moved) => Verdict::Well,
            (Health::Silent, _) => missed(FailureClass::Hang, "it does not answer health checks in time".into()),
            (Health::Overloaded(why), _) if !busy => missed(FailureClass::Health, why),
            (_, Motion::Stands) => stands.map_or(Verdict::Well, Verdict::Missed),
            // Its kind tells, and now it does not, though nothing is there to keep it busy.
            (_, Motion::Unknown) if silent && !busy => {
                missed(FailureClass::Hang, "it does not answer what it works on in time".into())
            }
            (_, Motion::Idle) if leases == 0 && policy.canary => return Next::AskForWork,
            (_, Motion::Fresh | Motion::Idle | Motion::Unknown) => Verdict::Well,
        })
    }

    /// Takes in what became of the work that it was asked for.
    pub fn canary(&mut self, outcome: Canary) -> Verdict {
        if let Some(last) = &mut self.last {
            // The counters moved, or will, by our own doing: the next round compares with nothing.
            last.counters.clear();
        }
        let declined = std::mem::take(&mut self.declined);
        match outcome {
            Canary::Done => {
                self.canary_lost = false;
                Verdict::Well
            }
            Canary::GaveWay => Verdict::Open,
            Canary::Declined if declined == 0 => {
                self.declined = 1;
                Verdict::Well
            }
            Canary::Declined => {
                self.declined = declined + 1;
                let detail = "it says that nothing runs, and has no room for one unit of work";
                Verdict::Missed(Failure::new(FailureClass::Health, detail))
            }
            Canary::Failed(failure) => Verdict::Missed(failure),
            Canary::Silent => {
                self.canary_lost = true;
                let detail = "it answers health checks but does not decode: one unit of work, and nothing else to do, \
                    was not done in time";
                Verdict::Missed(Failure::new(FailureClass::Hang, detail))
            }
        }
    }

    fn motion(&self, work: &Work, leases: u16) -> Motion {
        let has_work = |s: &Signals| s.running > 0 || s.waiting > 0;
        let now = match work {
            Work::Told(now) => now,
            Work::Untold => return Motion::Unknown,
            // Who had something to do and no longer answers gets nowhere, as far as can be seen.
            Work::Silent if leases > 0 || self.canary_lost || self.last.as_ref().is_some_and(has_work) => {
                return if self.last.is_some() { Motion::Stands } else { Motion::Unknown };
            }
            Work::Silent => return Motion::Unknown,
        };
        let moved = self.last.as_ref().is_some_and(|before| got_somewhere(before, now));
        match &self.last {
            _ if moved => Motion::Moved,
            _ if !has_work(now) => Motion::Idle,
            Some(before) if has_work(before) => Motion::Stands,
            Some(_) if self.canary_lost && leases == 0 => Motion::Stands,
            Some(_) | None => Motion::Fresh,
        }
    }

    /// Why it counts as a miss that it stands still, if it has stood for long enough. The misses are spread so that the
    /// last one falls on the end of its time.
    fn stands_for(&self, leases: u16, now: Tick, policy: &HealthPolicy) -> Option<Failure> {
        let stood = now.since(self.moved_at);
        let by_misses = policy.interval * policy.failures;
        let signals = self.last.as_ref()?;
        // A long prompt may take its time where nothing tells of it. Our own canary has none.
        let own = self.canary_lost && leases == 0;
        let limit = if signals.prefill_told || own || !signals.may_read_a_prompt() {
            by_misses
        } else {
            policy.busy_stall.max(by_misses)
        };
        // Half an interval for clocks that do not fall on the same instant twice.
        let ahead = by_misses.saturating_sub(policy.interval / 2);
        (stood + ahead >= limit).then(|| Failure::new(FailureClass::Hang, signals.stood_still(stood)))
    }
}

/// Whether anything moved between two answers. A counter that fell was reset by something that lives.
fn got_somewhere(before: &Signals, now: &Signals) -> bool {
    let counted = before.counters.iter().zip(&now.counters).any(|(before, now)| before != now);
    // A request that has left its slot was ended by something that lives; one that came is no sign of it.
    let in_slots = before.slots.iter().any(|b| {
        let same = now.slots.iter().find(|n| n.slot == b.slot && n.task == b.task);
        same.is_none_or(|n| (n.prompt, n.decoded) != (b.prompt, b.decoded))
    });
    counted || in_slots || now.running < before.running
}

impl Signals {
    fn may_read_a_prompt(&self) -> bool {
        self.slots.is_empty() || self.slots.iter().any(|slot| slot.decoded == 0)
    }

    fn stood_still(&self, stood: Duration) -> String {
        let of_each = self.slots.iter().map(|s| format!("slot {} at {} tokens", s.slot, s.decoded));
        let of_each: Vec<_> = of_each.take(4).collect();
        let told = if of_each.is_empty() { String::new() } else { format!(" ({})", of_each.join(", ")) };
        let (running, waiting, stood) = (self.running, self.waiting, stood.as_secs());
        format!(
            "{running} running and {waiting} waiting requests got no token and no prompt progress for {stood} s{told}"
        )
    }
}

#[cfg(test)]
mod tests;
