//! Leases that are waited for, expire, are renewed, or are asked for twice.
//!
//! The book of a pool is a value: an event and the time go in, actions come out. It does not count slots. Whether one is
//! free is known only where it is taken (the admission word of a replica), so a slot enters the book as an event, with
//! somebody or nobody to use it, and leaves it as an action, once.

mod book;
mod strange;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::liveness::Signals;
use crate::{Generation, PoolId, ReplicaId, Tick};

pub use book::LeaseBook;

/// One wish for a lease. Never used twice in a run of the daemon; the caller counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What tells a lease from every other of its pool: the run of the daemon that granted it, and the wish it came of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    /// The run.
    pub run: u64,
    /// The wish.
    pub ticket: Ticket,
}

/// The name of a lease. It says where its slot is, so that it means something to a later run of the daemon, too.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId {
    /// The pool.
    pub pool: PoolId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its generation.
    pub generation: Generation,
    /// Which of that pool's leases.
    pub mark: Mark,
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, replica, generation, mark } = self;
        write!(f, "lease-{pool}-{replica}-g{generation}-{:016x}-{}", mark.run, mark.ticket.0)
    }
}

/// A text that names no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not the name of a lease")]
pub struct NoLeaseId;

impl FromStr for LeaseId {
    type Err = NoLeaseId;
    fn from_str(s: &str) -> Result<Self, NoLeaseId> {
        fn decimal<T: FromStr>(s: &str) -> Option<T> {
            s.bytes().all(|b| b.is_ascii_digit()).then(|| s.parse().ok())?
        }
        let read = || {
            let mut from_the_end = s.strip_prefix("lease-")?.rsplitn(5, '-');
            let ticket = decimal(from_the_end.next()?)?;
            let run = from_the_end.next().filter(|r| r.len() == 16)?;
            let run = u64::from_str_radix(run, 16).ok()?;
            let generation = decimal(from_the_end.next()?.strip_prefix('g')?)?;
            let replica = decimal(from_the_end.next()?.strip_prefix('r')?)?;
            let pool = from_the_end.next()?.parse().ok()?;
            let mark = Mark { run, ticket: Ticket(ticket) };
            Some(Self { pool, replica: ReplicaId(replica), generation: Generation(generation), mark })
        };
        read().ok_or(NoLeaseId)
    }
}

/// For whom a lease is, as far as that was said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Holder {
    /// A job of the client.
    pub job_id: Option<Arc<str>>,
    /// A conversation: its leases are on one replica where that is possible.
    pub session_id: Option<Arc<str>>,
    /// Whose it is.
    pub tenant_id: Option<Arc<str>>,
}

/// The book's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most that wait.
    pub waiting: usize,
    /// Longest a lease can be asked for, and longest that slots count as taken because an earlier run may have leased them.
    pub max_ttl: Duration,
    /// How long slots of an adopted engine count as taken whatever the engine says.
    pub grace: Duration,
    /// How long the key of a lease that is over is remembered.
    pub remember: Duration,
    /// Most such keys, and most sessions of which the last replica is remembered.
    pub remembered: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            waiting: 1024,
            max_ttl: Duration::from_secs(3600),
            grace: Duration::from_secs(10),
            remember: Duration::from_secs(600),
            remembered: 4096,
        }
    }
}

/// A wish for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Its name.
    pub ticket: Ticket,
    /// How long it lasts. Unset: what is granted is a guard in this process, which the book does not keep.
    pub ttl: Option<Duration>,
    /// End of patience. Where that is now, it is granted at once or not at all.
    pub until: Tick,
    /// For whom.
    pub holder: Holder,
    /// A hint.
    pub prefer: Option<ReplicaId>,
    /// The same key and the same wish are the same lease.
    pub key: Option<Arc<str>>,
}

/// Which slot: of this replica, in this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct At {
    /// The replica.
    pub replica: ReplicaId,
    /// Its generation.
    pub generation: Generation,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants a lease.
    Ask(Ask),
    /// A slot was taken for whoever is first.
    Slot(At),
    /// The client of a wish is gone.
    Leave(Ticket),
    /// Nobody that waits can be served.
    Dismiss,
    /// A lease is to go on. `current`: the generation of its replica now.
    Renew {
        /// Which.
        lease: Mark,
        /// Where its name says it is.
        at: At,
        /// The replica's generation now, where there is that replica.
        current: Option<Generation>,
        /// For how long; unset = as long as before.
        ttl: Option<Duration>,
        /// For whom, where it is of an earlier run: that is not known here.
        holder: Holder,
    },
    /// A slot was taken for a lease of an earlier run that is to go on.
    Reclaim {
        /// Which.
        lease: Mark,
        /// Where.
        at: At,
        /// For how long.
        ttl: Duration,
        /// For whom.
        holder: Holder,
    },
    /// A lease is given back.
    Release {
        /// Which.
        lease: Mark,
        /// Where its name says it is.
        at: At,
        /// The replica's generation now, where there is that replica.
        current: Option<Generation>,
    },
    /// Every slot of this generation was taken back: its engine is gone.
    Revoked(At),
    /// An engine of an earlier run serves on; all its slots were taken, since who leased them is not known.
    Adopted {
        /// Which.
        at: At,
        /// Its slots.
        slots: u16,
    },
    /// It says what it works on.
    Busy {
        /// Which.
        at: At,
        /// On what, requests of known leases among it.
        work: Signals,
    },
    /// Time has passed.
    Timer,
}

/// How a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was given back.
    Released,
    /// Its time was over.
    Expired,
    /// Its engine is gone, and the slot with it.
    Revoked,
}

impl End {
    /// The end as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// Why a wish was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many wait already.
    Full,
    /// Its patience ended.
    Late,
    /// Nobody can be served.
    Dismissed,
    /// Its key stands for another wish.
    OtherWish,
    /// The lease of its key is over.
    KeyIsOver,
}

/// A lease that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub lease: Mark,
    /// Where.
    pub at: At,
    /// Which of the replica's slots: the lowest that no other lease of the book has.
    pub slot: u16,
    /// For whom.
    pub holder: Holder,
    /// How long it was asked for.
    pub ttl: Duration,
    /// When it was granted.
    pub since: Tick,
    /// When it ends by itself.
    pub until: Tick,
    /// The key it was asked for with.
    pub(crate) key: Option<Key>,
}

impl Held {
    /// Whether who asked for it can come back for it.
    #[must_use]
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }
}

/// A key belongs to its tenant.
pub(crate) type Key = (Option<Arc<str>>, Arc<str>);

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// It waits, with this many before it.
    Queued {
        /// The wish.
        ticket: Ticket,
        /// How many.
        position: usize,
    },
    /// It has asked with a key of a wish that waits already: what that gets, it gets.
    Joined {
        /// The wish.
        ticket: Ticket,
        /// The one that waits.
        to: Ticket,
    },
    /// It has the slot.
    Granted {
        /// The wish.
        ticket: Ticket,
        /// Whose slot.
        at: At,
        /// The lease that is held from now on; unset for a guard in this process.
        lease: Option<Mark>,
        /// For whom.
        holder: Holder,
    },
    /// The lease of its key is held already.
    Same {
        /// The wish.
        ticket: Ticket,
        /// The lease.
        lease: Mark,
    },
    /// It gets none.
    Refused {
        /// The wish.
        ticket: Ticket,
        /// Why.
        why: Refusal,
        /// For whom it was.
        holder: Holder,
    },
    /// Nobody wants the slot: it goes back.
    Unwanted(At),
    /// A lease is over; unless it was revoked, its slot goes back.
    Ended {
        /// What it was.
        held: Held,
        /// How.
        how: End,
    },
    /// A lease goes on.
    Renewed(Mark),
    /// A slot that counted as taken is this lease's from now on.
    Recognised(Mark),
    /// A lease of an earlier run could go on if there is a slot for it: [`Event::Reclaim`].
    NeedsSlot,
    /// Slots that counted as taken go back.
    Freed {
        /// Whose.
        at: At,
        /// How many.
        slots: u16,
    },
    /// The lease was ours, and is over.
    Over,
    /// There is no such lease, and as far as is known there never was.
    Unknown,
}
