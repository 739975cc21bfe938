use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::failure::Exit;
use crate::{CircuitBreaker, Draw, Failure, FailureClass, Generation, Tick};

fn proof() -> Proof {
    Proof { residency: "simulated", model: "m".into(), slots: 4, first_unit_ms: 1 }
}

/// What the executor would know, told only by actions.
#[derive(Default)]
struct Shadow {
    admission_open: bool,
    process: bool,
    proved: Option<Generation>,
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        5 => Just(Command::Start),
        1 => Just(Command::Wake),
        2 => (0u64..5000, any::<bool>()).prop_map(|(ms, f)| Command::Drain {
            deadline: Duration::from_millis(ms),
            on_deadline: if f { OnDeadline::Force } else { OnDeadline::Abort }
        }),
        1 => Just(Command::Resume),
        1 => Just(Command::ResetBreaker),
        1 => Just(Command::Unfence),
        1 => Just(Command::Unblocked),
        1 => (0u64..50, any::<bool>()).prop_map(|(g, ready)| Command::Adopt {
            generation: Generation(g),
            ready_since: ready.then_some(Tick(0)),
        }),
    ]
}

fn failure() -> impl Strategy<Value = Failure> {
    prop_oneof![
        8 => Just(Failure::crash(Exit::Code(1))),
        1 => Just(Failure::new(FailureClass::PortConflict, "taken")),
        1 => Just(Failure::new(FailureClass::DriverError, "xid")),
        1 => Just(Failure::new(FailureClass::Config, "flag")),
        1 => Just(Failure::new(FailureClass::Node, "disk")),
    ]
}

fn fact() -> impl Strategy<Value = Fact> {
    prop_oneof![
        4 => Just(Fact::Staged),
        4 => Just(Fact::Prepared),
        1 => Just(Fact::Blocked(Wait::Vram { detail: "full".into(), possible_at: None })),
        1 => failure().prop_map(Fact::Unstartable),
        4 => Just(Fact::Launched),
        1 => failure().prop_map(Fact::LaunchFailed),
        2 => Just(Fact::Progress),
        1 => Just(Fact::Unprovable),
        1 => Just(Fact::MemoryUnknown),
        4 => Just(Fact::Serving),
        4 => Just(Fact::Proved(proof())),
        1 => failure().prop_map(Fact::Unproved),
        2 => Just(Fact::Healthy),
        3 => failure().prop_map(Fact::Missed),
        2 => failure().prop_map(Fact::Exited),
        3 => Just(Fact::Gone),
        1 => Just(Fact::LeasesDone),
        1 => any::<bool>().prop_map(|p| Fact::Adopted(p.then(proof))),
        1 => failure().prop_map(Fact::NotAdopted),
        1 => failure().prop_map(Fact::GivenUp),
    ]
}

#[derive(Debug, Clone)]
enum Op {
    Command(Command),
    /// A fact of the current generation less this many.
    Fact(u64, Fact),
    Timer,
}

fn op() -> impl Strategy<Value = (Op, u64)> {
    let op = prop_oneof![
        2 => command().prop_map(Op::Command),
        8 => (prop_oneof![9 => Just(0u64), 1 => 1u64..3], fact()).prop_map(|(back, f)| Op::Fact(back, f)),
        2 => Just(Op::Timer),
    ];
    (op, prop_oneof![4 => 0u64..50, 1 => 0u64..5_000, 1 => 0u64..700_000])
}

/// A state in which a process is known to exist.
fn has_process(s: &State) -> bool {
    matches!(
        s,
        State::Starting { launch: Launch::Running, .. }
            | State::Warming { .. }
            | State::Ready { .. }
            | State::Suspect { .. }
            | State::Draining { .. }
            | State::Adopting { .. }
    )
}

fn check_sequence(ops: Vec<(Op, u64)>) -> Result<(), TestCaseError> {
    let policy = Policy::default();
    let mut r = Replica::new(Generation(0));
    let mut now = Tick(0);
    let mut shadow = Shadow::default();
    for (i, (op, dt)) in ops.into_iter().enumerate() {
        now = now + Duration::from_millis(dt);
        let before = r.clone();
        let event = match op {
            Op::Command(c) => Event::Command(c),
            Op::Fact(back, f) => Event::Engine(Generation(r.generation.0.saturating_sub(back)), f),
            Op::Timer => Event::Timer,
        };
        let stale = matches!(&event, Event::Engine(g, _) if *g != r.generation);
        if let Event::Engine(g, Fact::Proved(_) | Fact::Adopted(Some(_))) = &event
            && !stale
        {
            shadow.proved = Some(*g);
        }
        let is_timer = matches!(event, Event::Timer);
        let event_is_gone =
            matches!(event, Event::Engine(_, Fact::Gone)) || matches!(event, Event::Command(Command::Unfence));
        let actions = r.step(event, now, Draw::new((i % 100) as f64 / 100.0), &policy);
        if stale {
            prop_assert_eq!(&before, &r, "a late answer changed something");
            prop_assert!(actions.is_empty());
        }
        for a in &actions {
            match a {
                Action::OpenAdmission => {
                    prop_assert!(r.state.ready(), "admission opened in {}", r.state.code());
                    shadow.admission_open = true;
                }
                Action::CloseAdmission => shadow.admission_open = false,
                Action::Launch => {
                    prop_assert!(!shadow.process, "a second process was launched");
                }
                _ => {}
            }
        }
        if r.state.ready() {
            prop_assert_eq!(shadow.proved, Some(r.generation), "ready without a proof of this generation");
        }
        // Leases are granted in Ready only.
        prop_assert_eq!(shadow.admission_open, r.state.ready(), "admission open in {}", r.state.code());
        // A process is left behind only through Stopping.
        if has_process(&before.state) && !has_process(&r.state) {
            prop_assert!(matches!(r.state, State::Stopping { .. }), "{} -> {}", before.state.code(), r.state.code());
        }
        // Stopping and Fenced end only by proof, or by a person's word, or when the launch never brought a process.
        if matches!(before.state, State::Stopping { .. } | State::Fenced { .. })
            && !matches!(r.state, State::Stopping { .. } | State::Fenced { .. })
        {
            let nothing_launched = matches!(before.state, State::Stopping { stage: StopStage::Launching { .. }, .. });
            prop_assert!(event_is_gone || nothing_launched);
        }
        // A timer that is due is never left as it was: its driver would spin.
        if is_timer && let Some(due) = r.next_deadline(&policy) {
            prop_assert!(due > now, "{} is due at {due:?}, and it is {now:?} already", r.state.code());
        }
        if r.restarts > before.restarts {
            prop_assert_eq!(r.restarts, before.restarts + 1);
            prop_assert!(r.generation > before.generation, "a restart that is no start");
        }
        shadow.process = has_process(&r.state) || matches!(r.state, State::Stopping { .. } | State::Fenced { .. });
        prop_assert!(r.generation >= before.generation);
        if let State::Waiting { why: Wait::Backoff { until }, .. } = &r.state
            && *until > now
        {
            prop_assert!(until.since(now) <= policy.backoff.max() + Duration::from_millis(1));
        }
    }
    Ok(())
}

proptest! {
    // 2,000 sequences of 500 events: a million events.
    #![proptest_config(ProptestConfig { cases: 2_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_events_breaks_a_promise(ops in prop::collection::vec(op(), 500)) {
        check_sequence(ops)?;
    }
}

/// Feeds facts of the current generation and returns the actions of the last.
fn drive(r: &mut Replica, now: Tick, facts: impl IntoIterator<Item = Fact>) -> Vec<Action> {
    let mut last = Vec::new();
    for f in facts {
        last = r.step(Event::Engine(r.generation, f), now, Draw::new(1.0), &Policy::default());
    }
    last
}

fn to_ready(r: &mut Replica, now: Tick) {
    let _ = r.step(Event::Command(Command::Start), now, Draw::new(1.0), &Policy::default());
    drive(r, now, [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Serving, Fact::Proved(proof())]);
    assert!(r.state.ready());
}

#[test]
fn a_crash_loop_waits_longer_each_time_and_then_opens_the_breaker() {
    let mut r = Replica::new(Generation(0));
    let mut now = Tick(0);
    let _ = r.step(Event::Command(Command::Start), now, Draw::new(1.0), &Policy::default());
    let mut delays = Vec::new();
    for _ in 0..5 {
        drive(
            &mut r,
            now,
            [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Exited(Failure::crash(Exit::Code(1))), Fact::Gone],
        );
        let State::Waiting { why, .. } = &r.state else { panic!("{}", r.state.code()) };
        delays.push((why.code(), why.until().unwrap().since(now).as_secs_f64().round() as u64));
        now = why.until().unwrap();
        let _ = r.step(Event::Timer, now, Draw::new(1.0), &Policy::default());
    }
    assert_eq!(delays, [("backoff", 1), ("backoff", 2), ("backoff", 4), ("backoff", 8), ("breaker", 30)]);
    assert_eq!((r.state.code(), r.breaker.code(), r.generation), ("staging", "half_open", Generation(6)));
}

#[test]
fn a_reset_while_a_failed_engine_is_being_ended_ends_its_wait_too() {
    for fenced in [false, true] {
        let mut r = Replica::new(Generation(0));
        let _ = r.step(Event::Command(Command::Start), Tick(0), Draw::new(1.0), &Policy::default());
        let crash = Fact::Exited(Failure::crash(Exit::Code(1)));
        drive(&mut r, Tick(0), [Fact::Staged, Fact::Prepared, Fact::Launched, crash]);
        let mut now = Tick(1);
        if fenced {
            now = Tick(10_001);
            let _ = r.step(Event::Timer, now, Draw::new(1.0), &Policy::default());
        }
        assert_eq!(r.state.code(), if fenced { "fenced" } else { "stopping" });
        let _ = r.step(Event::Command(Command::ResetBreaker), now, Draw::new(1.0), &Policy::default());
        drive(&mut r, now, [Fact::Gone]);
        assert_eq!(r.state.code(), "staging", "nothing is held against it any more");
    }
}

#[test]
fn ready_for_ten_minutes_comes_back_at_once() {
    let mut r = Replica::new(Generation(0));
    to_ready(&mut r, Tick(0));
    let actions = drive(&mut r, Tick(600_000), [Fact::Exited(Failure::crash(Exit::Signal(9))), Fact::Gone]);
    assert_eq!((r.state.code(), actions), ("staging", vec![Action::CancelWork, Action::Stage]));
}

#[test]
fn an_exit_with_a_child_alive_is_not_restarted_before_the_child_is_gone() {
    let mut r = Replica::new(Generation(0));
    to_ready(&mut r, Tick(0));
    drive(&mut r, Tick(1), [Fact::Exited(Failure::crash(Exit::Code(0)))]);
    for t in 2..9_000 {
        assert!(r.step(Event::Timer, Tick(t), Draw::new(0.0), &Policy::default()).is_empty());
        assert_eq!(r.state.code(), "stopping");
    }
    let _ = r.step(Event::Timer, Tick(10_001), Draw::new(0.0), &Policy::default());
    assert_eq!(r.state.code(), "fenced");
    drive(&mut r, Tick(10_002), [Fact::Gone]);
    // The backoff delay was over long before the child was.
    assert_eq!(r.state.code(), "staging");
}

#[test]
fn a_stolen_port_is_tried_elsewhere_at_once_and_not_counted() {
    let mut r = Replica::new(Generation(0));
    let _ = r.step(Event::Command(Command::Start), Tick(0), Draw::new(0.0), &Policy::default());
    for _ in 0..3 {
        drive(
            &mut r,
            Tick(0),
            [Fact::Staged, Fact::Prepared, Fact::LaunchFailed(Failure::new(FailureClass::PortConflict, "taken"))],
        );
        assert_eq!(r.state.code(), "staging");
    }
    drive(
        &mut r,
        Tick(0),
        [Fact::Staged, Fact::Prepared, Fact::LaunchFailed(Failure::new(FailureClass::PortConflict, "taken"))],
    );
    assert_eq!((r.state.code(), r.breaker.code()), ("waiting", "closed"));
}

#[test]
fn what_the_node_holds_up_is_tried_again_later_and_later_and_held_against_nobody() {
    let full = || Fact::LaunchFailed(Failure::new(FailureClass::Node, "No space left on device"));
    let policy = Policy::default();
    for trial in [false, true] {
        let mut r = Replica::new(Generation(0));
        if trial {
            r.breaker = CircuitBreaker::resume(crate::BreakerState::Open { until: Tick(0), trips: 2 }, Tick(0));
        }
        let breaker = r.breaker;
        let (mut now, mut waits) = (Tick(0), Vec::new());
        let _ = r.step(Event::Command(Command::Start), now, Draw::new(1.0), &policy);
        for n in 1..=8 {
            let generation = r.generation;
            for fact in [Fact::Staged, Fact::Prepared, full()] {
                let _ = r.step(Event::Engine(generation, fact), now, Draw::new(1.0), &policy);
            }
            assert_eq!((r.state.code(), r.backoff.failures(), r.nth_failure()), ("waiting", 0, n));
            assert_eq!(r.breaker.code(), breaker.code(), "a trial that the node held up says nothing");
            let until = r.next_deadline(&policy).unwrap();
            waits.push(until.since(now).as_secs());
            now = until;
            let _ = r.step(Event::Timer, now, Draw::new(1.0), &policy);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        let generation = r.generation;
        for fact in [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Serving, Fact::Proved(proof())] {
            let _ = r.step(Event::Engine(generation, fact), now, Draw::new(1.0), &policy);
        }
        assert!(r.state.ready());
        assert_eq!(r.held_up.failures(), 0, "and it is over with the first start that succeeds");
    }
}

#[test]
fn a_stop_during_the_launch_stops_what_the_launch_brings() {
    let mut r = Replica::new(Generation(0));
    let _ = r.step(Event::Command(Command::Start), Tick(0), Draw::new(0.0), &Policy::default());
    drive(&mut r, Tick(0), [Fact::Staged, Fact::Prepared]);
    let stop = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };
    assert!(r.step(Event::Command(stop), Tick(1), Draw::new(0.0), &Policy::default()).is_empty());
    assert_eq!(drive(&mut r, Tick(2), [Fact::Launched]), [Action::Terminate, Action::AwaitGone]);
    drive(&mut r, Tick(3), [Fact::Gone]);
    assert_eq!(r.state, State::Idle);
}

#[test]
fn suspect_at_the_second_miss_and_ended_at_the_third() {
    let mut r = Replica::new(Generation(0));
    to_ready(&mut r, Tick(0));
    let miss = || Fact::Missed(Failure::new(FailureClass::Hang, "no token"));
    assert!(drive(&mut r, Tick(1), [miss()]).is_empty());
    assert_eq!(drive(&mut r, Tick(2), [miss()]), [Action::CloseAdmission]);
    assert_eq!(drive(&mut r, Tick(3), [Fact::Healthy]), [Action::OpenAdmission]);
    drive(&mut r, Tick(4), [miss(), miss(), miss()]);
    assert_eq!(r.state.code(), "stopping");
    assert_eq!(r.last_failure.as_ref().unwrap().1.class, FailureClass::Hang);
}

#[test]
fn drain_waits_forces_aborts_and_resumes() {
    let force = |ms| Command::Drain { deadline: Duration::from_millis(ms), on_deadline: OnDeadline::Force };
    let p = Policy::default();
    let mut r = Replica::new(Generation(0));
    to_ready(&mut r, Tick(0));
    assert_eq!(r.step(Event::Command(force(2_000)), Tick(0), Draw::new(0.0), &p), [Action::CloseAdmission]);
    assert!(r.step(Event::Timer, Tick(1_999), Draw::new(0.0), &p).is_empty());
    let mut resumed = r.clone();
    assert_eq!(
        resumed.step(Event::Command(Command::Resume), Tick(1_999), Draw::new(0.0), &p)[0],
        Action::OpenAdmission
    );
    assert_eq!(r.step(Event::Timer, Tick(2_000), Draw::new(0.0), &p)[0], Action::RevokeLeases);
    // KILL follows within two seconds of the deadline.
    assert_eq!(r.next_deadline(&p), Some(Tick(3_800)));
    let mut r = resumed;
    let abort = Command::Drain { deadline: Duration::from_secs(1), on_deadline: OnDeadline::Abort };
    let _ = r.step(Event::Command(abort), Tick(5_000), Draw::new(0.0), &p);
    assert_eq!(r.step(Event::Timer, Tick(6_000), Draw::new(0.0), &p)[0], Action::OpenAdmission);
    assert!(r.state.ready());
}

fn command_at(r: &mut Replica, ms: u64, command: Command) -> Vec<Action> {
    r.step(Event::Command(command), Tick(ms), Draw::new(1.0), &Policy::default())
}

fn fact_at(r: &mut Replica, ms: u64, fact: Fact) -> Vec<Action> {
    r.step(Event::Engine(r.generation, fact), Tick(ms), Draw::new(1.0), &Policy::default())
}

fn timer_at(r: &mut Replica, ms: u64) -> Vec<Action> {
    r.step(Event::Timer, Tick(ms), Draw::new(1.0), &Policy::default())
}

/// From Idle, Waiting or Staging to Ready.
fn bring_up(r: &mut Replica, ms: u64) {
    if !matches!(r.state, State::Staging { .. }) {
        command_at(r, ms, Command::Start);
        timer_at(r, ms);
    }
    drive(r, Tick(ms), [Fact::Staged, Fact::Prepared, Fact::Launched, Fact::Serving, Fact::Proved(proof())]);
    assert!(r.state.ready(), "{:?}", r.state);
}

const STOP: Command = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };

fn crash_once(r: &mut Replica, ms: u64) {
    fact_at(r, ms, Fact::Exited(Failure::crash(Exit::Code(1))));
    fact_at(r, ms, Fact::Gone);
}

#[test]
fn a_trial_that_a_person_ends_is_inconclusive() {
    let mut r = Replica::new(Generation(0));
    let mut now = 0;
    while r.breaker.code() != "open" {
        bring_up(&mut r, now);
        crash_once(&mut r, now);
        now = r.next_deadline(&Policy::default()).unwrap().0;
    }
    bring_up(&mut r, now);
    assert_eq!(r.breaker.code(), "half_open");
    command_at(&mut r, now + 1, STOP);
    fact_at(&mut r, now + 1, Fact::Gone);
    assert_eq!(r.state, State::Idle);
    assert_eq!(command_at(&mut r, now + 2, Command::Start), [Action::Stage], "the trial may be made again at once");
    assert_eq!(r.breaker.code(), "half_open");
}

#[test]
fn a_start_during_a_drain_calls_it_off() {
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    let drain = Command::Drain { deadline: Duration::from_secs(60), on_deadline: OnDeadline::Force };
    command_at(&mut r, 1, drain);
    assert_eq!(command_at(&mut r, 2, Command::Start), [Action::OpenAdmission, Action::WatchHealth]);
    assert!(r.state.ready());
}

#[test]
fn a_drain_is_over_by_its_deadline_and_two_seconds_however_it_ends() {
    let drain = |secs| Command::Drain { deadline: Duration::from_secs(secs), on_deadline: OnDeadline::Force };
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    command_at(&mut r, 0, drain(2));
    fact_at(&mut r, 10, Fact::LeasesDone);
    assert_eq!(r.next_deadline(&Policy::default()), Some(Tick(3_800)));
    // A longer one ends with the engine's own grace, unless somebody is in a hurry.
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    command_at(&mut r, 0, drain(600));
    fact_at(&mut r, 10, Fact::LeasesDone);
    assert_eq!(r.next_deadline(&Policy::default()), Some(Tick(30_010)));
    command_at(&mut r, 1_000, STOP);
    assert_eq!(r.next_deadline(&Policy::default()), Some(Tick(2_800)));
    assert_eq!(timer_at(&mut r, 2_800), [Action::Kill]);
}

#[test]
fn a_suspect_engine_keeps_its_leases_until_the_deadline_and_stays_suspect_if_the_drain_is_given_up() {
    let missed = || Fact::Missed(Failure::new(FailureClass::Hang, "x"));
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    drive(&mut r, Tick(1), [missed(), missed()]);
    assert_eq!(r.state.code(), "suspect");
    assert_eq!(r.last_failure, None, "nothing has failed yet");
    let drain = Command::Drain { deadline: Duration::from_secs(60), on_deadline: OnDeadline::Force };
    assert_eq!(command_at(&mut r, 2, drain), [Action::CloseAdmission]);
    assert_eq!(command_at(&mut r, 3, Command::Resume), [Action::WatchHealth]);
    assert_eq!(r.state.code(), "suspect");
    assert_eq!(fact_at(&mut r, 4, Fact::Healthy), [Action::OpenAdmission]);
}

#[test]
fn a_long_good_run_is_not_forgotten_when_a_person_ends_it() {
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    crash_once(&mut r, 0);
    bring_up(&mut r, 1_000);
    assert_eq!(r.backoff.failures(), 1);
    // Also without an end: at ten minutes Ready nothing is held against it any more.
    assert_eq!(r.next_deadline(&Policy::default()), Some(Tick(601_000)));
    command_at(&mut r, 602_000, STOP);
    fact_at(&mut r, 602_000, Fact::Gone);
    assert_eq!((r.backoff.failures(), r.breaker), (0, CircuitBreaker::default()));
}

#[test]
fn what_the_log_says_after_ready_is_never_permanent() {
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    fact_at(&mut r, 1, Fact::Exited(Failure::new(FailureClass::Config, "signal 9: error: invalid argument")));
    fact_at(&mut r, 1, Fact::Gone);
    assert!(matches!(r.state, State::Waiting { why: Wait::Backoff { .. }, .. }), "{:?}", r.state);
    assert_eq!(r.last_failure.unwrap().1.class.code(), "crash");
}

#[test]
fn only_starts_after_a_failure_are_restarts() {
    let mut r = Replica::new(Generation(0));
    bring_up(&mut r, 0);
    crash_once(&mut r, 0);
    bring_up(&mut r, 1_000);
    assert_eq!(r.restarts, 1);
    command_at(&mut r, 2_000, STOP);
    command_at(&mut r, 2_000, Command::Start);
    fact_at(&mut r, 2_000, Fact::Gone);
    assert_eq!((r.state.code(), r.restarts), ("staging", 1));
}

#[test]
fn an_engine_that_died_while_nobody_looked_has_crashed_and_a_ready_one_keeps_its_time() {
    let policy = Policy::default();
    let now = Tick(700_000);
    let step = |r: &mut Replica, event| r.step(event, now, Draw::new(0.5), &policy);
    let adopt = |ready_since| {
        let mut r = Replica::new(Generation(6));
        let adopt = Command::Adopt { generation: Generation(7), ready_since };
        assert_eq!(step(&mut r, Event::Command(adopt)), [Action::Adopt]);
        r
    };
    let mut kept = adopt(Some(Tick(5)));
    let actions = step(&mut kept, Event::Engine(Generation(7), Fact::Adopted(Some(proof()))));
    assert_eq!(actions, [Action::OpenAdmission, Action::WatchHealth]);
    assert!(matches!(kept.state, State::Ready { since: Tick(5), .. }), "{:?}", kept.state);

    let mut unfinished = adopt(None);
    assert_eq!(step(&mut unfinished, Event::Engine(Generation(7), Fact::Adopted(None))), [Action::WatchStart]);

    for (ready_since, at_once) in [(None, false), (Some(Tick(690_000)), false), (Some(Tick(5)), true)] {
        let mut dead = adopt(ready_since);
        let exit = Fact::Exited(Failure::crash(Exit::Signal(9)));
        assert!(step(&mut dead, Event::Engine(Generation(7), exit)).contains(&Action::AwaitGone));
        let State::Stopping { then, .. } = &dead.state else { panic!("{:?}", dead.state) };
        assert_eq!(*then == Then::Restart, at_once, "{then:?}");
        assert_eq!(dead.backoff.failures() > 0, !at_once);
        assert_eq!(dead.generation, Generation(7));
    }
}
