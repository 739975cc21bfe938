use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn at(s: u64) -> Tick {
    Tick(s * 1000)
}

fn policy() -> HealthPolicy {
    HealthPolicy::default()
}

fn slot(task: u64, prompt: u64, decoded: u64) -> SlotWork {
    SlotWork { slot: 0, task, prompt, decoded }
}

fn busy(slots: Vec<SlotWork>) -> Signals {
    Signals { running: u32::try_from(slots.len()).unwrap(), slots, prefill_told: true, ..Signals::default() }
}

fn serving(work: Work) -> Round {
    Round { health: Health::Serving, work, leases: 1, flow: 0 }
}

fn class(next: &Next) -> Option<FailureClass> {
    match next {
        Next::Decided(Verdict::Missed(failure)) => Some(failure.class.clone()),
        _ => None,
    }
}

const WELL: Next = Next::Decided(Verdict::Well);

/// When the third miss in a row is told, of rounds that see what `signals` says at their time.
fn ended_at(policy: &HealthPolicy, rounds: u64, signals: impl Fn(u64) -> Round) -> Option<u64> {
    let (mut liveness, mut misses) = (Liveness::new(Tick(0)), 0);
    let step = u64::try_from(policy.interval.as_millis()).unwrap();
    (1..=rounds).map(|n| n * step).find(|&now| {
        misses = match liveness.observe(signals(now), Tick(now), policy) {
            Next::Decided(Verdict::Missed(failure)) => {
                assert_eq!(failure.class, FailureClass::Hang);
                misses + 1
            }
            _ => 0,
        };
        misses >= policy.failures
    })
}

#[test]
fn a_busy_engine_that_stands_still_is_a_hang_within_45_s_whenever_it_stopped() {
    for stopped in (20_000..40_000).step_by(137) {
        // A token every 50 ms until then.
        let tokens = |now: u64| now.min(stopped) / 50;
        let ended = ended_at(&policy(), 20, |now| serving(Work::Told(busy(vec![slot(1, 9, tokens(now))]))));
        let after = ended.unwrap() - stopped;
        // The last answer may take as long as it may.
        assert!(after + 5_000 <= 45_000, "seen {after} ms after {stopped}");
        // Silence of one that had something to do is no better.
        let silent = ended_at(&policy(), 20, |now| {
            let signals = busy(vec![slot(1, 9, tokens(now))]);
            serving(if now > stopped { Work::Silent } else { Work::Told(signals) })
        });
        assert!(silent.is_some() && silent <= ended);
    }
}

#[test]
fn whoever_gets_somewhere_is_well_for_ever() {
    for kind in 0..5u64 {
        let ended = ended_at(&policy(), 100, |now| {
            let n = now / 10_000;
            let mut signals = match kind {
                // One long answer; one long prompt; a new request each round; counters only; ever fewer in work.
                0 => busy(vec![slot(1, 9, n)]),
                1 => busy(vec![slot(1, n, 0)]),
                2 => busy(vec![slot(n, 0, 0)]),
                3 => Signals { running: 3, counters: vec![7, n], ..Signals::default() },
                _ => Signals { running: u32::try_from(200 - n).unwrap(), ..Signals::default() },
            };
            signals.waiting = 40;
            // It answers 429 or 503, or late, and works on.
            let health = if n % 2 == 0 { Health::Overloaded("/health answers 503".into()) } else { Health::Silent };
            Round { health, work: Work::Told(signals), leases: 4, flow: 0 }
        });
        assert_eq!(ended, None, "{kind}");
    }
}

#[test]
fn a_request_that_came_is_no_sign_of_life() {
    let ended = ended_at(&policy(), 20, |now| {
        let mut slots = vec![slot(1, 9, 3)];
        slots.extend((0..now / 10_000).map(|n| SlotWork { slot: 1 + u32::try_from(n).unwrap(), ..slot(9, 0, 0) }));
        serving(Work::Told(busy(slots)))
    });
    assert_eq!(ended, Some(40_000));
}

#[test]
fn where_nothing_tells_of_a_long_prompt_busy_stall_has_the_say() {
    let prompt = |decoded| Signals { prefill_told: false, ..busy(vec![slot(1, 0, decoded)]) };
    let of = |policy: &HealthPolicy, decoded| ended_at(policy, 60, |_| serving(Work::Told(prompt(decoded))));
    // From the first sight at 10 s.
    assert_eq!(of(&policy(), 0), Some(310_000));
    assert_eq!(of(&HealthPolicy { busy_stall: 100 * SECOND, ..policy() }, 0), Some(110_000));
    assert_eq!(of(&HealthPolicy { busy_stall: SECOND, ..policy() }, 0), Some(40_000), "never sooner than the misses");
    assert_eq!(of(&policy(), 1), Some(40_000), "the prompt is read");
    let counters = || Signals { running: 2, counters: vec![5], ..Signals::default() };
    assert_eq!(ended_at(&policy(), 60, |_| serving(Work::Told(counters()))), Some(310_000));
}

#[test]
fn it_is_asked_for_work_only_when_it_has_none_and_nothing_shows_that_it_works() {
    let idle = || Signals { counters: vec![3], ..Signals::default() };
    let round = |work, leases| Round { health: Health::Serving, work: Work::Told(work), leases, flow: 0 };
    let mut liveness = Liveness::new(at(0));
    assert_eq!(liveness.observe(round(idle(), 0), at(10), &policy()), Next::AskForWork);
    assert_eq!(liveness.canary(Canary::Done), Verdict::Well);
    // The token it made was ours.
    let counted = Signals { counters: vec![4], ..idle() };
    assert_eq!(liveness.observe(round(counted, 0), at(20), &policy()), Next::AskForWork);
    assert_eq!(liveness.canary(Canary::Done), Verdict::Well);
    for (work, leases) in [(idle(), 1), (busy(vec![slot(1, 0, 0)]), 0), (Signals { waiting: 1, ..idle() }, 0)] {
        assert_eq!(liveness.clone().observe(round(work, leases), at(30), &policy()), WELL);
    }
    assert_eq!(liveness.observe(round(idle(), 0), at(30), &HealthPolicy { canary: false, ..policy() }), WELL);
    // Somebody without a lease had it work meanwhile.
    assert_eq!(liveness.observe(round(Signals { counters: vec![9], ..idle() }, 0), at(40), &policy()), WELL);
    let untold = Round { health: Health::Serving, work: Work::Untold, leases: 0, flow: 0 };
    assert_eq!(liveness.observe(untold, at(50), &policy()), WELL, "who does not say is taken for busy");
}

#[test]
fn an_idle_engine_that_decodes_no_more_is_seen_by_its_canaries_also_where_those_get_stuck() {
    for (stuck, prefill_told) in [(false, true), (true, true), (true, false)] {
        let (mut liveness, mut misses, mut lost) = (Liveness::new(at(0)), 0, 0u64);
        for n in 1.. {
            let slots = (0..lost).map(|n| SlotWork { slot: u32::try_from(n).unwrap(), ..slot(n, 0, 0) }).collect();
            let signals = Signals { prefill_told, ..busy(if stuck { slots } else { Vec::new() }) };
            let verdict = match liveness.observe(
                Round { health: Health::Serving, work: Work::Told(signals), leases: 0, flow: 0 },
                at(10 * n),
                &policy(),
            ) {
                Next::AskForWork => {
                    lost += 1;
                    liveness.canary(Canary::Silent)
                }
                Next::Decided(verdict) => verdict,
            };
            let Verdict::Missed(failure) = verdict else { panic!("{stuck}: well in round {n}") };
            assert_eq!(failure.class, FailureClass::Hang);
            misses += 1;
            if misses == 3 {
                assert_eq!(n, 3, "{stuck}");
                break;
            }
        }
    }
}

#[test]
fn a_canary_that_gave_way_tells_nothing_and_one_refused_twice_by_an_idle_engine_is_a_miss() {
    let mut liveness = Liveness::new(at(0));
    assert_eq!(liveness.canary(Canary::GaveWay), Verdict::Open);
    assert_eq!(liveness.canary(Canary::Declined), Verdict::Well);
    assert!(matches!(liveness.canary(Canary::Declined), Verdict::Missed(f) if f.class == FailureClass::Health));
    assert_eq!(liveness.canary(Canary::Done), Verdict::Well);
    assert_eq!(liveness.canary(Canary::Declined), Verdict::Well);
}

#[test]
fn illness_is_no_hang_and_overload_without_load_is_illness() {
    let see = |health: Health, work: Work, leases| {
        Liveness::new(at(0)).observe(Round { health, work, leases, flow: 0 }, at(10), &policy())
    };
    let told = |signals| Work::Told(signals);
    let over = || Health::Overloaded("/health answers 503".into());
    assert_eq!(class(&see(Health::Ill("500".into()), told(busy(vec![slot(1, 1, 1)])), 1)), Some(FailureClass::Health));
    assert_eq!(
        class(&see(over(), told(Signals::default()), 1)),
        Some(FailureClass::Health),
        "it says that nothing runs"
    );
    assert_eq!(see(over(), told(busy(vec![slot(2, 0, 0)])), 1), WELL);
    assert_eq!(see(over(), Work::Untold, 1), WELL);
    assert_eq!(class(&see(over(), Work::Untold, 0)), Some(FailureClass::Health));
    assert_eq!(class(&see(Health::Silent, Work::Untold, 1)), Some(FailureClass::Hang));
    assert_eq!(class(&see(Health::Serving, Work::Silent, 0)), Some(FailureClass::Hang));
}

#[test]
fn a_hang_says_what_stood_still() {
    let mut liveness = Liveness::new(at(0));
    let round = || serving(Work::Told(Signals { waiting: 2, ..busy(vec![slot(1, 5, 17)]) }));
    assert_eq!(liveness.observe(round(), at(10), &policy()), WELL);
    let Next::Decided(Verdict::Missed(failure)) = liveness.observe(round(), at(20), &policy()) else { panic!("well") };
    assert_eq!(
        failure.detail,
        "1 running and 2 waiting requests got no token and no prompt progress for 10 s (slot 0 at 17 tokens)"
    );
}

#[test]
fn what_clients_get_from_it_is_a_sign_of_life_also_where_its_kind_tells_nothing() {
    for work in [Work::Untold, Work::Told(busy(vec![slot(1, 9, 3)])), Work::Silent] {
        let flows_until =
            |end: u64| ended_at(&policy(), 60, |now| Round { flow: now.min(end) / 10_000, ..serving(work.clone()) });
        assert_eq!(flows_until(u64::MAX), None, "{work:?}");
        // What stands still once it flows no more is seen as before; where nothing is told, nothing is.
        let stood = flows_until(100_000);
        let told = matches!(work, Work::Told(_));
        assert_eq!(stood.is_some_and(|at| (100_001..=145_000).contains(&at)), told, "{work:?} {stood:?}");
    }
    // It does not outweigh an engine that says that it is ill.
    let mut liveness = Liveness::new(at(0));
    let ill = |flow| Round { health: Health::Ill("503".into()), flow, ..serving(Work::Untold) };
    liveness.observe(ill(1), at(10), &policy());
    assert_eq!(class(&liveness.observe(ill(2), at(20), &policy())), Some(FailureClass::Health));
}
