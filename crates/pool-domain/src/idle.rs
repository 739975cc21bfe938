//! When an on-demand pool that nobody uses stops.

use std::time::Duration;

use crate::Tick;

/// What a replica does, as far as idleness needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Nothing runs.
    Rests,
    /// It serves, or someone waits for it.
    Busy,
    /// It could serve and nobody asks.
    Unused {
        /// Ready since when.
        ready_since: Tick,
        /// End of its last lease, or when it became Ready.
        last_used: Tick,
    },
    /// It waits to be started.
    Waits,
    /// It is being started or ended.
    Moves,
}

/// How patient a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdlePolicy {
    /// It stops when nobody used it for this long.
    pub idle_ttl: Duration,
    /// A replica that became Ready less than this ago stays.
    pub min_ready_time: Duration,
}

/// What follows for the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, until something changes.
    Stays,
    /// It is to be looked at again then.
    Until(Tick),
    /// It stops.
    Stops {
        /// Since when nobody used it.
        unused_since: Tick,
    },
}

/// Whether a pool stops. `asked` is when somebody last asked for it, whether or not it was running. Any use of one replica
/// is use of the pool: it stops whole or not at all.
#[must_use]
pub fn verdict(replicas: &[Activity], asked: Tick, policy: &IdlePolicy, now: Tick) -> Verdict {
    let (mut unused_since, mut earliest, mut up) = (asked, asked, false);
    for replica in replicas {
        match replica {
            Activity::Moves => return Verdict::Stays,
            // Nobody tells when a lease ends; before this it cannot be due.
            Activity::Busy => return Verdict::Until(now + policy.idle_ttl.max(Duration::from_secs(1))),
            Activity::Unused { ready_since, last_used } => {
                unused_since = unused_since.max(*last_used);
                earliest = earliest.max(*ready_since + policy.min_ready_time);
                up = true;
            }
            Activity::Waits => up = true,
            Activity::Rests => {}
        }
    }
    let due = earliest.max(unused_since + policy.idle_ttl);
    match up {
        false => Verdict::Stays,
        true if now >= due => Verdict::Stops { unused_since },
        true => Verdict::Until(due),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: IdlePolicy =
        IdlePolicy { idle_ttl: Duration::from_secs(600), min_ready_time: Duration::from_secs(60) };

    fn at(seconds: u64) -> Tick {
        Tick(seconds * 1000)
    }

    fn unused(ready_since: u64, last_used: u64) -> Activity {
        Activity::Unused { ready_since: at(ready_since), last_used: at(last_used) }
    }

    #[test]
    fn the_last_use_of_any_replica_counts() {
        let both = [unused(0, 100), unused(0, 250)];
        assert_eq!(verdict(&both, at(0), &POLICY, at(849)), Verdict::Until(at(850)));
        assert_eq!(verdict(&both, at(0), &POLICY, at(850)), Verdict::Stops { unused_since: at(250) });
        assert_eq!(verdict(&both, at(300), &POLICY, at(850)), Verdict::Until(at(900)));
        assert_eq!(verdict(&[both[0], Activity::Busy], at(0), &POLICY, at(5_000)), Verdict::Until(at(5_600)));
    }

    #[test]
    fn one_that_became_ready_a_moment_ago_stays_however_short_its_patience() {
        let short = IdlePolicy { idle_ttl: Duration::from_secs(5), ..POLICY };
        assert_eq!(verdict(&[unused(100, 100)], at(0), &short, at(110)), Verdict::Until(at(160)));
        assert_eq!(verdict(&[unused(100, 158)], at(0), &short, at(160)), Verdict::Until(at(163)));
    }

    #[test]
    fn what_moves_is_left_alone_and_what_waits_for_nobody_is_called_off() {
        assert_eq!(verdict(&[Activity::Moves, unused(0, 0)], at(0), &POLICY, at(9_000)), Verdict::Stays);
        assert_eq!(verdict(&[Activity::Rests], at(0), &POLICY, at(9_000)), Verdict::Stays);
        assert_eq!(verdict(&[], at(0), &POLICY, at(9_000)), Verdict::Stays);
        assert_eq!(verdict(&[Activity::Waits], at(10), &POLICY, at(609)), Verdict::Until(at(610)));
        assert_eq!(verdict(&[Activity::Waits], at(10), &POLICY, at(610)), Verdict::Stops { unused_since: at(10) });
    }

    #[test]
    fn no_patience_at_all_does_not_spin() {
        let none = IdlePolicy { idle_ttl: Duration::ZERO, min_ready_time: Duration::ZERO };
        assert_eq!(verdict(&[Activity::Busy], at(0), &none, at(7)), Verdict::Until(at(8)));
    }
}
