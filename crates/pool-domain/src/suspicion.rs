//! When failures of engines throw suspicion on a device.
//!
//! One pool that meets driver errors may have a faulty engine. Several pools that meet them on one device within a short
//! time have the device in common: it becomes Suspect, which keeps new starts away while running engines go on, and is
//! readmitted after a probation without a further accusation.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::{PoolId, Tick};

/// When a device becomes Suspect, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuspicionPolicy {
    /// Pools that have to accuse it, each once or more.
    pub pools: usize,
    /// Within this time.
    pub window: Duration,
    /// Since the last accusation.
    pub probation: Duration,
}

impl Default for SuspicionPolicy {
    fn default() -> Self {
        // The probation is twice the longest backoff delay, so that no engine's next start hits a device that was
        // readmitted a moment before.
        Self { pools: 2, window: Duration::from_secs(600), probation: Duration::from_secs(120) }
    }
}

/// An engine failed in a way that accuses its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accusation {
    /// Whose engine.
    pub pool: PoolId,
    /// The class of its failure as one word.
    pub class: &'static str,
    /// When.
    pub at: Tick,
}

/// What is held against one device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Case {
    /// The newest accusation of each pool.
    pub accusations: BTreeMap<PoolId, Accusation>,
    /// Nothing new starts there until then.
    pub suspect_until: Option<Tick>,
}

/// What is held against the devices of a node, by UUID.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Suspicions {
    cases: BTreeMap<String, Case>,
}

impl Suspicions {
    /// What was held against each device, by UUID, when the daemon ended.
    #[must_use]
    pub fn resume(cases: BTreeMap<String, Case>) -> Self {
        Self { cases }
    }

    /// What is held against each device, by UUID.
    #[must_use]
    pub fn cases(&self) -> &BTreeMap<String, Case> {
        &self.cases
    }

    /// Takes in an accusation. Says whether the device became Suspect by it.
    pub fn accuse(&mut self, device: &str, accusation: Accusation, policy: &SuspicionPolicy) -> bool {
        let case = self.cases.entry(device.to_owned()).or_default();
        let now = accusation.at;
        case.accusations.insert(accusation.pool.clone(), accusation);
        case.accusations.retain(|_, a| now.since(a.at) < policy.window);
        let was = case.suspect_until.is_some();
        if was || case.accusations.len() >= policy.pools {
            let until = now + policy.probation;
            case.suspect_until = Some(case.suspect_until.map_or(until, |before| before.max(until)));
        }
        !was && case.suspect_until.is_some()
    }

    /// Readmits the devices whose probation is over, with nothing held against them, and names them. Accusations that
    /// are too old to count are forgotten.
    pub fn readmit(&mut self, now: Tick, policy: &SuspicionPolicy) -> Vec<String> {
        let over = |case: &Case| case.suspect_until.is_some_and(|until| until <= now);
        let readmitted = self.cases.iter().filter(|(_, c)| over(c)).map(|(uuid, _)| uuid.clone()).collect();
        self.cases.retain(|_, case| {
            if case.suspect_until.is_none() {
                case.accusations.retain(|_, a| now.since(a.at) < policy.window);
            }
            !over(case) && !case.accusations.is_empty()
        });
        readmitted
    }

    /// A person says that it is well. Says whether it was Suspect.
    pub fn acquit(&mut self, device: &str) -> bool {
        self.cases.remove(device).is_some_and(|case| case.suspect_until.is_some())
    }

    /// The devices that are Suspect, each with the reason.
    pub fn suspects(&self) -> impl Iterator<Item = (&str, String)> {
        self.cases.iter().filter(|(_, case)| case.suspect_until.is_some()).map(|(uuid, case)| {
            let of: Vec<String> = case.accusations.values().map(|a| format!("`{}` ({})", a.pool, a.class)).collect();
            (uuid.as_str(), format!("engines of several pools failed there: {}", of.join(", ")))
        })
    }

    /// When the next probation is over.
    #[must_use]
    pub fn next_readmission(&self) -> Option<Tick> {
        self.cases.values().filter_map(|case| case.suspect_until).min()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const P: SuspicionPolicy =
        SuspicionPolicy { pools: 2, window: Duration::from_secs(600), probation: Duration::from_secs(120) };

    fn by(pool: &str, secs: u64) -> Accusation {
        Accusation { pool: pool.parse().unwrap(), class: "driver_error", at: Tick(secs * 1000) }
    }

    fn names(s: &Suspicions) -> Vec<&str> {
        s.suspects().map(|(uuid, _)| uuid).collect()
    }

    #[test]
    fn one_pool_alone_throws_no_suspicion_however_often_it_fails() {
        let mut s = Suspicions::default();
        for n in 0..100 {
            assert!(!s.accuse("GPU-a", by("a", n), &P));
        }
        assert!(!s.accuse("GPU-b", by("b", 100), &P), "another device");
        assert!(names(&s).is_empty());
    }

    #[test]
    fn two_pools_within_the_window_do_and_two_far_apart_do_not() {
        let mut s = Suspicions::default();
        s.accuse("GPU-a", by("a", 0), &P);
        assert!(!s.accuse("GPU-a", by("b", 600), &P));
        assert!(s.accuse("GPU-a", by("a", 1_199), &P));
        assert_eq!(names(&s), ["GPU-a"]);
        let (_, why) = s.suspects().next().unwrap();
        assert!(why.contains("`a` (driver_error), `b` (driver_error)"), "{why}");
    }

    #[test]
    fn it_is_readmitted_after_a_probation_without_a_further_accusation() {
        let mut s = Suspicions::default();
        s.accuse("GPU-a", by("a", 0), &P);
        s.accuse("GPU-a", by("b", 10), &P);
        assert_eq!(s.next_readmission(), Some(Tick(130_000)));
        assert!(!s.accuse("GPU-a", by("a", 100), &P), "it is Suspect already");
        assert!(s.readmit(Tick(219_999), &P).is_empty());
        assert_eq!(s.readmit(Tick(220_000), &P), ["GPU-a"]);
        assert_eq!(s, Suspicions::default());
        assert!(!s.accuse("GPU-a", by("a", 221), &P), "what was before is forgotten");
    }

    #[test]
    fn a_person_may_acquit_it() {
        let mut s = Suspicions::default();
        s.accuse("GPU-a", by("a", 0), &P);
        s.accuse("GPU-a", by("b", 0), &P);
        assert!(s.acquit("GPU-a") && !s.acquit("GPU-a"));
        assert_eq!(s, Suspicions::default());
    }

    proptest! {
        /// Whatever comes: bounded by pools and devices, Suspect only with accusers enough, and in the end all is over.
        #[test]
        fn nobody_is_suspect_for_ever(ops in prop::collection::vec((0u8..3, 0u8..4, 0u64..400), 1..200)) {
            let mut s = Suspicions::default();
            let mut now = 0;
            for (device, pool, dt) in ops {
                now += dt;
                if pool == 3 {
                    s.readmit(Tick(now * 1000), &P);
                } else {
                    s.accuse(&format!("GPU-{device}"), by(&format!("p{pool}"), now), &P);
                }
                prop_assert!(s.cases.len() <= 3 && s.cases.values().all(|c| c.accusations.len() <= 3));
                for case in s.cases.values() {
                    prop_assert!(case.suspect_until.is_none_or(|u| u <= Tick(now * 1000) + P.probation));
                }
            }
            s.readmit(Tick((now + 600) * 1000), &P);
            prop_assert_eq!(s, Suspicions::default());
        }
    }
}
