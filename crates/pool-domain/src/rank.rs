//! Which replica serves a request best, and why the others do not.

use std::fmt;

use crate::reserve::gib;
use crate::{PoolId, ReplicaKey, ResolvedMask};

/// Whether a replica takes requests at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It proved that it serves.
    Ready,
    /// It finishes what it has.
    Draining,
    /// Neither; its state as one word.
    NotReady(&'static str),
}

/// A replica as far as placement needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub key: ReplicaKey,
    /// Whether it takes requests.
    pub standing: Standing,
    /// The names it answers to: the model's id, then aliases.
    pub models: Vec<String>,
    /// UUIDs of its devices; empty for an engine that is not ours.
    pub devices: Vec<String>,
    /// Bytes free on the one of its devices that has the least.
    pub vram_free: u64,
    /// Leases held.
    pub leases: u32,
    /// Requests it takes at once.
    pub slots: u32,
    /// Tokens a request may have, where known.
    pub context: Option<u64>,
}

/// What is asked for. What is `None` is not asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// Only this pool.
    pub pool: Option<PoolId>,
    /// A model by id or alias.
    pub model: Option<String>,
    /// Tokens, prompt and answer together.
    pub context: Option<u64>,
    /// Only on these devices: a replica with any other is refused.
    pub devices: Option<ResolvedMask>,
    /// A hint: this one goes first if it can serve at all.
    pub prefer_replica: Option<ReplicaKey>,
}

/// Why a replica does not serve a request. In the order in which they are looked for: what no waiting helps first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhyNot {
    /// It is of another pool.
    OtherPool,
    /// It serves another model.
    ModelDiffers,
    /// It has a device outside the mask.
    WrongDevice,
    /// It takes fewer tokens.
    ContextTooSmall {
        /// Tokens it takes.
        has: u64,
        /// Tokens asked for.
        wanted: u64,
    },
    /// It is not ready.
    NotReady {
        /// Its state as one word.
        state: &'static str,
    },
    /// It is being drained.
    Draining,
    /// Every slot is taken.
    Saturated {
        /// Its slots.
        slots: u32,
    },
}

impl WhyNot {
    /// Whether waiting may help.
    #[must_use]
    pub fn passes(self) -> bool {
        matches!(self, Self::NotReady { .. } | Self::Draining | Self::Saturated { .. })
    }

    /// The reason as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::OtherPool => "other_pool",
            Self::ModelDiffers => "model_differs",
            Self::WrongDevice => "wrong_device",
            Self::ContextTooSmall { .. } => "context_too_small",
            Self::NotReady { .. } => "not_ready",
            Self::Draining => "draining",
            Self::Saturated { .. } => "saturated",
        }
    }
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherPool => f.write_str("it is of another pool"),
            Self::ModelDiffers => f.write_str("it serves another model"),
            Self::WrongDevice => f.write_str("it has a device outside the mask"),
            Self::ContextTooSmall { has, wanted } => write!(f, "it takes {has} tokens of the {wanted} asked for"),
            Self::NotReady { state } => write!(f, "it is not ready: {state}"),
            Self::Draining => f.write_str("it is being drained"),
            Self::Saturated { slots: 1 } => f.write_str("its one slot is taken"),
            Self::Saturated { slots } => write!(f, "all of its {slots} slots are taken"),
        }
    }
}

/// What a replica has to offer, or why it is not for this request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It can serve.
    Serves {
        /// It goes first because it was asked for.
        preferred: bool,
        /// Bytes free.
        vram_free: u64,
        /// Leases held.
        leases: u32,
        /// Requests it takes at once.
        slots: u32,
    },
    /// It cannot.
    Refused(WhyNot),
}

impl Verdict {
    /// Whether it can serve.
    #[must_use]
    pub fn serves(self) -> bool {
        matches!(self, Self::Serves { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serves { preferred, vram_free, leases, slots } => {
                let hint = if *preferred { "preferred, " } else { "" };
                write!(f, "{hint}{} free, {leases} of {slots} slots taken", gib(*vram_free))
            }
            Self::Refused(why) => why.fmt(f),
        }
    }
}

/// A candidate with its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranked<'a> {
    /// The candidate.
    pub candidate: &'a Candidate,
    /// Its reason.
    pub verdict: Verdict,
}

/// All candidates, the best first. Those that can serve come before those that cannot; among them the preferred one,
/// then most free memory, then fewest leases, then id. The others are in order of id.
#[must_use]
pub fn rank<'a>(candidates: &'a [Candidate], request: &Request) -> Vec<Ranked<'a>> {
    let judge = |candidate| {
        let verdict = verdict(candidate, request);
        (place(verdict), Ranked { candidate, verdict })
    };
    let mut ranked: Vec<(u128, Ranked<'a>)> = candidates.iter().map(judge).collect();
    ranked.sort_unstable_by(|(a, x), (b, y)| a.cmp(b).then_with(|| x.candidate.key.cmp(&y.candidate.key)));
    ranked.into_iter().map(|(_, ranked)| ranked).collect()
}

/// What the order goes by before the id, as one number, lowest first: a thousand replicas are compared ten thousand
/// times.
fn place(verdict: Verdict) -> u128 {
    match verdict {
        Verdict::Serves { preferred, vram_free, leases, .. } => {
            u128::from(!preferred) << 96 | u128::from(!vram_free) << 32 | u128::from(leases)
        }
        Verdict::Refused(_) => u128::MAX,
    }
}

fn verdict(c: &Candidate, request: &Request) -> Verdict {
    match why_not(c, request) {
        Some(why) => Verdict::Refused(why),
        None => Verdict::Serves {
            preferred: request.prefer_replica.as_ref() == Some(&c.key),
            vram_free: c.vram_free,
            leases: c.leases,
            slots: c.slots,
        },
    }
}

fn why_not(c: &Candidate, request: &Request) -> Option<WhyNot> {
    if request.pool.as_ref().is_some_and(|pool| *pool != c.key.pool) {
        return Some(WhyNot::OtherPool);
    }
    if request.model.as_ref().is_some_and(|model| !c.models.contains(model)) {
        return Some(WhyNot::ModelDiffers);
    }
    // An engine whose devices are not known cannot be said to keep to the mask.
    let outside = |mask: &ResolvedMask| c.devices.is_empty() || !c.devices.iter().all(|d| mask.uuids.contains(d));
    if request.devices.as_ref().is_some_and(outside) {
        return Some(WhyNot::WrongDevice);
    }
    if let (Some(wanted), Some(has)) = (request.context, c.context)
        && has < wanted
    {
        return Some(WhyNot::ContextTooSmall { has, wanted });
    }
    match c.standing {
        Standing::NotReady(state) => Some(WhyNot::NotReady { state }),
        Standing::Draining => Some(WhyNot::Draining),
        Standing::Ready if c.leases >= c.slots => Some(WhyNot::Saturated { slots: c.slots }),
        Standing::Ready => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ReplicaId;

    fn candidate(pool: &str, replica: u16) -> Candidate {
        Candidate {
            key: ReplicaKey { pool: pool.parse().unwrap(), replica: ReplicaId(replica) },
            standing: Standing::Ready,
            models: vec!["m".into(), "alias".into()],
            devices: vec!["GPU-0".into()],
            vram_free: 10,
            leases: 0,
            slots: 4,
            context: Some(8192),
        }
    }

    fn order_of(candidates: &[Candidate], request: &Request) -> Vec<String> {
        rank(candidates, request).iter().map(|r| r.candidate.key.to_string()).collect()
    }

    #[test]
    fn most_free_memory_then_fewest_leases_then_id() {
        let candidates = [
            Candidate { leases: 1, ..candidate("b", 0) },
            candidate("b", 2),
            candidate("b", 1),
            candidate("a", 0),
            Candidate { vram_free: 11, leases: 3, ..candidate("z", 0) },
            Candidate { standing: Standing::Draining, vram_free: 99, ..candidate("a", 9) },
        ];
        assert_eq!(order_of(&candidates, &Request::default()), ["z-r0", "a-r0", "b-r1", "b-r2", "b-r0", "a-r9"]);
    }

    #[test]
    fn a_preferred_replica_goes_first_only_if_it_can_serve() {
        let mut candidates = [candidate("a", 0), Candidate { vram_free: 1, leases: 3, ..candidate("b", 0) }];
        let request = Request { prefer_replica: Some(candidates[1].key.clone()), ..Request::default() };
        assert_eq!(order_of(&candidates, &request), ["b-r0", "a-r0"]);
        assert_eq!(rank(&candidates, &request)[0].verdict.to_string(), "preferred, 0.0 GiB free, 3 of 4 slots taken");
        candidates[1].leases = 4;
        assert_eq!(order_of(&candidates, &request), ["a-r0", "b-r0"]);
    }

    #[test]
    fn every_refusal_says_why() {
        let asked = Request {
            pool: Some("a".parse().unwrap()),
            model: Some("alias".into()),
            context: Some(8000),
            devices: Some(ResolvedMask { uuids: vec!["GPU-0".into(), "GPU-1".into()] }),
            prefer_replica: None,
        };
        let good = candidate("a", 0);
        assert!(rank(std::slice::from_ref(&good), &asked)[0].verdict.serves());
        for (change, code, passes) in [
            (Candidate { key: candidate("b", 0).key, ..good.clone() }, "other_pool", false),
            (Candidate { models: vec!["n".into()], ..good.clone() }, "model_differs", false),
            (Candidate { devices: vec!["GPU-0".into(), "GPU-2".into()], ..good.clone() }, "wrong_device", false),
            (Candidate { devices: vec![], ..good.clone() }, "wrong_device", false),
            (Candidate { context: Some(4096), ..good.clone() }, "context_too_small", false),
            (Candidate { standing: Standing::NotReady("starting"), ..good.clone() }, "not_ready", true),
            (Candidate { standing: Standing::Draining, ..good.clone() }, "draining", true),
            (Candidate { leases: 4, ..good.clone() }, "saturated", true),
        ] {
            let Verdict::Refused(why) = rank(&[change], &asked)[0].verdict else { panic!("{code}") };
            assert_eq!((why.code(), why.passes()), (code, passes));
            assert!(!why.to_string().is_empty());
        }
    }

    proptest! {
        #[test]
        fn masks_are_hard_and_everyone_is_answered(
            given in prop::collection::vec((0u16..4, 0u64..4, 0u32..4, prop::collection::vec(0u8..4, 0..3)), 0..30),
            mask in prop::collection::vec(0u8..4, 0..3),
        ) {
            let name = |d: &u8| format!("GPU-{d}");
            let candidates: Vec<Candidate> = given.iter().map(|(replica, vram_free, leases, devices)| Candidate {
                vram_free: *vram_free,
                leases: *leases,
                slots: 3,
                devices: devices.iter().map(name).collect(),
                ..candidate("p", *replica)
            }).collect();
            let mask = ResolvedMask { uuids: mask.iter().map(name).collect() };
            let request = Request { devices: Some(mask.clone()), ..Request::default() };
            let ranked = rank(&candidates, &request);
            prop_assert_eq!(ranked.len(), candidates.len());
            for r in &ranked {
                prop_assert!(!r.verdict.serves() || r.candidate.devices.iter().all(|d| mask.uuids.contains(d)));
            }
            for pair in ranked.windows(2) {
                let (a, b) = (pair[0], pair[1]);
                prop_assert!(a.verdict.serves() || !b.verdict.serves());
                if a.verdict.serves() && b.verdict.serves() {
                    prop_assert!(a.candidate.vram_free >= b.candidate.vram_free);
                }
            }
        }
    }
}
