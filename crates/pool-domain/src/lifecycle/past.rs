//! What is held against a replica. It goes with it through a restart of the daemon, so that no crash loop is reset by one.

use std::time::Duration;

use super::{Policy, Replica, Wait};
use crate::{Backoff, BreakerState, CircuitBreaker, Generation, Tick};

/// The failures of a replica and what they earned, as they are kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Past {
    /// Failures the backoff counts.
    pub failures: u32,
    /// The circuit breaker.
    pub breaker: BreakerState,
    /// End of the backoff delay that is being waited for.
    pub not_before: Option<Tick>,
    /// Starts that followed a failure.
    pub restarts: u64,
    /// The last generation whose end is in these numbers: found again by a later daemon, it is not counted again.
    pub counted: Generation,
}

impl Past {
    /// The same after a reboot, where ticks begin anew: waits go on at `now` with what was left of them at `noted`.
    #[must_use]
    pub fn carried_over(mut self, noted: Tick, now: Tick) -> Self {
        let moved = |until: Tick| now + until.since(noted);
        self.not_before = self.not_before.map(moved);
        if let BreakerState::Open { until, .. } = &mut self.breaker {
            *until = moved(*until);
        }
        self
    }
}

impl Replica {
    /// A replica at rest that goes on with its past. `generation` is the last one ever used. No wait is longer than the
    /// longest of the policy, which may be another than it was.
    #[must_use]
    pub fn resume(generation: Generation, past: Past, now: Tick, policy: &Policy) -> Self {
        let capped = |until: Tick, longest: Duration| until.min(now + longest);
        Self {
            backoff: Backoff::resume(past.failures),
            // A trial stays one: its engine may be adopted. If it is not, the next start makes it again.
            breaker: CircuitBreaker::resume(past.breaker, now + policy.breaker.max_open_for()),
            restarts: past.restarts,
            // What was never durable is used again.
            counted: past.counted.min(generation),
            not_before: past.not_before.map(|t| capped(t, policy.backoff.max())).filter(|t| *t > now),
            ..Self::new(generation)
        }
    }

    /// What has to be kept.
    #[must_use]
    pub fn past(&self) -> Past {
        Past {
            failures: self.backoff.failures(),
            breaker: self.breaker.state(),
            not_before: self.not_before,
            restarts: self.restarts,
            counted: self.counted,
        }
    }

    /// What it earned for its last failure, if that is not over yet and longer than the breaker's pause, which waits by
    /// itself.
    pub(super) fn waits_for(&self, now: Tick) -> Option<Wait> {
        let until = self.not_before.filter(|until| *until > now)?;
        Some(match self.breaker.open_until() {
            Some(open) => Wait::Breaker { until: until.max(open) },
            None => Wait::Backoff { until },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Command, Event, Fact, OnDeadline, Proof, State, Wait};
    use super::*;
    use crate::failure::Exit;
    use crate::{BackoffPolicy, BreakerPolicy, Draw, Failure};

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn step(r: &mut Replica, now: u64, event: Event) {
        let _ = r.step(event, Tick(now), Draw::new(1.0), &Policy::default());
    }

    /// A replica whose starts failed this often, at boot time 0, the delays not counted.
    fn failed(times: u32) -> Replica {
        let mut r = Replica::new(Generation(0));
        step(&mut r, 0, Event::Command(Command::Start));
        for n in 0..times {
            if n > 0 {
                r.state = State::Idle;
                step(&mut r, 0, Event::Command(Command::Start));
            }
            let failed = Fact::Unstartable(Failure::crash(Exit::Code(1)));
            let event = Event::Engine(r.generation, failed);
            step(&mut r, 0, event);
        }
        r
    }

    fn again(r: &Replica, now: u64) -> Replica {
        Replica::resume(r.generation, r.past(), Tick(now), &Policy::default())
    }

    #[test]
    fn a_backoff_delay_is_waited_out_by_the_next_daemon() {
        let stop = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };
        for stopped_in_order in [false, true] {
            let mut r = failed(3);
            if stopped_in_order {
                step(&mut r, 1_000, Event::Command(stop));
            }
            let mut r = again(&r, 1_500);
            step(&mut r, 1_500, Event::Command(Command::Wake));
            assert!(matches!(r.state, State::Waiting { why: Wait::Backoff { until: Tick(4_000) }, .. }), "{r:?}");
            step(&mut r, 4_000, Event::Timer);
            assert_eq!(
                (r.state.code(), r.restarts, r.backoff.failures(), r.past().not_before),
                ("staging", 1, 3, None)
            );
        }
    }

    #[test]
    fn an_open_breaker_stays_open_for_the_rest_of_its_pause() {
        let mut r = again(&failed(5), 20_000);
        step(&mut r, 20_000, Event::Command(Command::Wake));
        assert!(matches!(r.state, State::Waiting { why: Wait::Breaker { until: Tick(30_000) }, .. }), "{r:?}");
        step(&mut r, 30_000, Event::Timer);
        assert_eq!((r.state.code(), r.breaker.code()), ("staging", "half_open"));
        // The daemon dies during the trial: the next one makes it again, and knows how often it has opened.
        let mut r = again(&r, 31_000);
        step(&mut r, 31_000, Event::Command(Command::Wake));
        assert_eq!(r.breaker.state(), BreakerState::HalfOpen { trips: 1 });
        // Or the engine of the trial lives on, and its time Ready counts.
        let mut r = again(&r, 32_000);
        let generation = r.generation;
        step(&mut r, 32_000, Event::Command(Command::Adopt { generation, ready_since: None }));
        let proof = Proof { residency: "vram", model: "m".into(), slots: 1, first_unit_ms: 1 };
        let event = Event::Engine(r.generation, Fact::Adopted(Some(proof)));
        step(&mut r, 32_000, event);
        step(&mut r, 92_000, Event::Timer);
        assert_eq!((r.state.code(), r.breaker.code()), ("ready", "closed"));
    }

    #[test]
    fn an_open_breaker_does_not_shorten_the_backoff_of_the_next_daemon_either() {
        let policy = Policy { breaker: BreakerPolicy::new(1, 1, s(1), s(2), s(60)).unwrap(), ..Policy::default() };
        let policy = Policy { backoff: BackoffPolicy::new(s(40), s(60), 2.0, 0.0, s(600)).unwrap(), ..policy };
        let mut r = Replica::new(Generation(0));
        let _ = r.step(Event::Command(Command::Start), Tick(0), Draw::new(1.0), &policy);
        let failed = Event::Engine(r.generation, Fact::Unstartable(Failure::crash(Exit::Code(1))));
        let _ = r.step(failed, Tick(0), Draw::new(1.0), &policy);
        let mut r = Replica::resume(r.generation, r.past(), Tick(10), &policy);
        let _ = r.step(Event::Command(Command::Wake), Tick(10), Draw::new(1.0), &policy);
        assert!(matches!(r.state, State::Waiting { why: Wait::Breaker { until: Tick(40_000) }, .. }), "{r:?}");
    }

    #[test]
    fn nor_does_it_start_sooner_when_its_engine_is_still_being_ended() {
        let mut r = again(&failed(3), 1_000);
        let generation = r.generation;
        step(&mut r, 1_000, Event::Command(Command::Adopt { generation, ready_since: None }));
        step(
            &mut r,
            1_000,
            Event::Command(Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }),
        );
        step(&mut r, 1_000, Event::Command(Command::Wake));
        step(&mut r, 1_500, Event::Engine(generation, Fact::Gone));
        assert!(matches!(r.state, State::Waiting { why: Wait::Backoff { until: Tick(4_000) }, .. }), "{r:?}");
    }

    /// The daemon was killed after it had written what an end earned and before it struck the engine out.
    #[test]
    fn an_end_that_is_counted_is_not_counted_again_by_the_next_daemon() {
        for (ready_since, failures) in [(None, 1), (None, 5), (Some(Tick(0)), 2)] {
            let mut before = failed(failures);
            before.counted = before.generation;
            let mut r = again(&before, 100);
            let generation = r.generation;
            step(&mut r, 100, Event::Command(Command::Adopt { generation, ready_since }));
            step(&mut r, 200, Event::Engine(generation, Fact::Exited(Failure::crash(Exit::Code(1)))));
            step(&mut r, 300, Event::Engine(generation, Fact::Gone));
            assert_eq!(r.past(), before.past());
            let waits = if failures == 5 { "breaker" } else { "backoff" };
            assert!(matches!(&r.state, State::Waiting { why, .. } if why.code() == waits), "{r:?}");
            // The next one is another.
            step(&mut r, 60_000, Event::Timer);
            let generation = r.generation;
            for fact in [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Exited(Failure::crash(Exit::Code(1)))] {
                step(&mut r, 60_100, Event::Engine(generation, fact));
            }
            assert_eq!((r.backoff.failures(), r.past().counted), (failures + 1, generation));
        }
    }

    /// A start that failed before anything was launched may leave its number to the next daemon.
    #[test]
    fn a_generation_that_never_had_an_engine_counts_when_it_has_one() {
        let mut r = failed(1);
        r.counted = r.generation;
        let mut r = Replica::resume(Generation(0), r.past(), Tick(5_000), &Policy::default());
        step(&mut r, 5_000, Event::Command(Command::Start));
        let generation = r.generation;
        for fact in [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Exited(Failure::crash(Exit::Code(1)))] {
            step(&mut r, 5_000, Event::Engine(generation, fact));
        }
        assert_eq!((generation, r.backoff.failures()), (Generation(1), 2));
    }

    /// Nor does what is left of it, whoever can or cannot tell how it ended.
    #[test]
    fn what_is_left_of_a_counted_engine_does_not_start_the_next_one_sooner() {
        let mut r = again(&failed(3), 1_000);
        let generation = r.generation;
        step(&mut r, 1_000, Event::Command(Command::Adopt { generation, ready_since: None }));
        step(&mut r, 1_000, Event::Engine(generation, Fact::NotAdopted(Failure::crash(Exit::Unknown))));
        step(&mut r, 1_500, Event::Engine(generation, Fact::Gone));
        assert!(matches!(r.state, State::Waiting { why: Wait::Backoff { until: Tick(4_000) }, .. }), "{r:?}");
    }

    #[test]
    fn a_person_need_not_wait() {
        let mut r = again(&failed(1), 10);
        step(&mut r, 10, Event::Command(Command::Start));
        assert_eq!((r.state.code(), r.restarts), ("staging", 0));
        let mut r = again(&failed(1), 10);
        step(&mut r, 10, Event::Command(Command::ResetBreaker));
        assert_eq!(r.past(), Past::default());
    }

    #[test]
    fn after_a_reboot_waits_go_on_with_what_was_left_and_never_exceed_the_policy() {
        let open = Past { breaker: BreakerState::Open { until: Tick(90_000), trips: 2 }, ..Past::default() };
        let past = Past { not_before: Some(Tick(65_000)), ..open }.carried_over(Tick(60_000), Tick(100));
        assert_eq!(past.not_before, Some(Tick(5_100)));
        assert_eq!(past.breaker, BreakerState::Open { until: Tick(30_100), trips: 2 });
        // A clock that cannot be, or a policy that became shorter.
        let r = Replica::resume(
            Generation(7),
            Past {
                not_before: Some(Tick(u64::MAX)),
                breaker: BreakerState::Open { until: Tick(u64::MAX), trips: 9 },
                ..past
            },
            Tick(100),
            &Policy::default(),
        );
        assert_eq!((r.past().not_before, r.breaker.open_until()), (Some(Tick(60_100)), Some(Tick(300_100))));
        // What is over is over.
        let r = Replica::resume(Generation(7), past, Tick(5_100), &Policy::default());
        assert_eq!(r.past().not_before, None);
    }

    #[test]
    fn ten_minutes_ready_leave_no_past() {
        let mut r = failed(2);
        r.state = State::Ready {
            since: Tick(0),
            proof: Proof { residency: "vram", model: "m".into(), slots: 1, first_unit_ms: 1 },
            misses: 0,
        };
        step(&mut r, 600_000, Event::Timer);
        assert_eq!(r.past(), Past::default());
    }
}
