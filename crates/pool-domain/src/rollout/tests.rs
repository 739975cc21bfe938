use std::collections::BTreeMap;

use proptest::{prop_assert, proptest};

use super::*;

/// A pool as a rollout sees it: who is there, made from what, whether it runs, whether it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    new: bool,
    runs: bool,
    serves: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pool {
    members: BTreeMap<ReplicaId, Member>,
    committed: bool,
}

impl Pool {
    fn old(count: u16) -> Self {
        let member = Member { new: false, runs: true, serves: true };
        Self { members: (0..count).map(|n| (ReplicaId(n), member.clone())).collect(), committed: false }
    }

    fn each(&mut self, ids: &[ReplicaId], change: impl Fn(&mut Member)) {
        for id in ids {
            if let Some(member) = self.members.get_mut(id) {
                change(member);
            }
        }
    }

    /// Carries out as much of a step as `share` of its replicas: a failure in the middle.
    fn carry_out(&mut self, step: &Step, share: usize) {
        let part = |ids: &[ReplicaId]| ids.iter().copied().take(share).collect::<Vec<_>>();
        match step {
            Step::Verify => {}
            Step::Stop(ids) => self.each(&part(ids), |m| m.runs = false),
            Step::Change(ids) => self.each(&part(ids), |m| m.new = true),
            Step::Add(new) => {
                for (id, _) in new.iter().take(share) {
                    let before = self.members.insert(*id, Member { new: true, runs: false, serves: false });
                    assert_eq!(before, None, "a replica of that name is there already");
                }
            }
            Step::Start(ids) => {
                for id in part(ids) {
                    assert!(
                        self.members[&id].new && !self.members[&id].runs,
                        "only what is new and at rest is started"
                    );
                }
                self.each(&part(ids), |m| m.runs = true);
            }
            Step::Commit => self.committed = share > 0,
            Step::Flip { to, from } => {
                assert!(self.committed);
                self.each(to, |m| m.serves = true);
                self.each(from, |m| m.serves = false);
            }
            Step::Retire(ids) => {
                for id in part(ids) {
                    assert!(!self.members[&id].serves, "nobody leaves while it serves");
                    self.members.remove(&id);
                }
            }
        }
    }

    fn undo(&mut self, step: &Step) {
        match step {
            Step::Verify => {}
            Step::Stop(ids) => {
                assert!(ids.iter().all(|id| !self.members[id].new), "it comes back as it was");
                self.each(ids, |m| m.runs = true);
            }
            Step::Change(ids) => self.each(ids, |m| m.new = false),
            Step::Add(new) => self.members.retain(|id, _| new.iter().all(|(added, _)| added != id)),
            Step::Start(ids) => self.each(ids, |m| m.runs = false),
            Step::Commit => self.committed = false,
            Step::Flip { .. } | Step::Retire(_) => panic!("nothing is undone after the commit"),
        }
    }

    fn serving(&self) -> usize {
        self.members.values().filter(|m| m.runs && m.serves).count()
    }
}

fn incumbents(count: u16) -> Vec<Incumbent> {
    (0..count).map(|n| Incumbent { id: ReplicaId(n), place: n }).collect()
}

const STRATEGIES: [Strategy; 4] = [Strategy::Auto, Strategy::InPlace, Strategy::Overlap, Strategy::Rolling];

/// Carries a rollout out; at the step numbered `fails` only a share of it is done.
fn run(strategy: Strategy, count: u16, places: u16, asleep: bool, fails: Option<(usize, usize)>) -> (Pool, Outcome) {
    let mut pool = Pool::old(count);
    if asleep {
        pool.members.values_mut().for_each(|m| m.runs = false);
    }
    let mut rollout = Rollout::new(plan(strategy, &incumbents(count), &[], places, asleep));
    for turn in 0..1000 {
        match rollout.next().clone() {
            Next::End(outcome) => return (pool.clone(), outcome.clone()),
            Next::Do(step) => {
                let step = step.clone();
                match fails {
                    Some((at, share)) if at == turn => {
                        pool.carry_out(&step, share);
                        rollout.failed("it does not".into());
                    }
                    _ => {
                        pool.carry_out(&step, usize::MAX);
                        rollout.done();
                    }
                }
            }
            Next::Undo(step) => {
                let step = step.clone();
                pool.undo(&step);
                rollout.done();
            }
        }
    }
    panic!("it never ends");
}

#[test]
fn without_a_failure_only_the_new_is_left() {
    for strategy in STRATEGIES {
        for (count, places) in [(1, 1), (3, 3), (1, 4), (4, 1), (2, 3)] {
            let (pool, outcome) = run(strategy, count, places, false, None);
            assert_eq!(outcome, Outcome::New);
            assert!(pool.committed && pool.members.len() == usize::from(places), "{strategy}: {pool:?}");
            assert!(pool.members.values().all(|m| m.new && m.runs && m.serves), "{strategy}: {pool:?}");
        }
    }
}

#[test]
fn a_failure_at_any_step_of_any_strategy_ends_exactly_in_the_old_or_in_the_new() {
    for strategy in STRATEGIES {
        for (count, places) in [(1, 1), (3, 3), (1, 4), (4, 1), (2, 3)] {
            for asleep in [false, true] {
                let steps = plan(strategy, &incumbents(count), &[], places, asleep);
                let commit = steps.iter().position(|s| *s == Step::Commit).unwrap();
                for (at, step) in steps.iter().enumerate() {
                    for share in 0..=usize::from(count.max(places)) {
                        let (pool, outcome) = run(strategy, count, places, asleep, Some((at, share)));
                        if at > commit {
                            assert_eq!(outcome, Outcome::New);
                            assert!(pool.members.values().filter(|m| m.serves).all(|m| m.new && m.runs != asleep));
                        } else {
                            assert_eq!(outcome, Outcome::Old { why: "it does not".into() });
                            let mut old = Pool::old(count);
                            old.members.values_mut().for_each(|m| m.runs = !asleep);
                            assert_eq!(pool, old, "{strategy} at step {at} ({step:?})");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn with_overlap_as_many_serve_at_every_step_and_rolling_takes_one_at_a_time() {
    for (strategy, least) in [(Strategy::Overlap, 3), (Strategy::Rolling, 2), (Strategy::InPlace, 0)] {
        let mut pool = Pool::old(3);
        let mut fewest = 3;
        for step in plan(strategy, &incumbents(3), &[], 3, false) {
            pool.carry_out(&step, usize::MAX);
            fewest = fewest.min(pool.serving());
        }
        assert_eq!(fewest, least, "{strategy}");
    }
}

#[test]
fn when_the_way_back_fails_too_both_reasons_are_told_and_the_rest_is_undone() {
    let mut rollout = Rollout::new(plan(Strategy::Rolling, &incumbents(2), &[], 2, false));
    for _ in 0..6 {
        rollout.done();
    }
    assert_eq!(rollout.next(), Next::Do(&Step::Start(vec![ReplicaId(1)])));
    rollout.failed("the new one crashed".into());
    rollout.failed("the disk is gone".into());
    rollout.failed("nor is there memory".into());
    let mut undone = Vec::new();
    while let Next::Undo(step) = rollout.next() {
        undone.push(step.clone());
        rollout.done();
    }
    assert!(undone.contains(&Step::Start(vec![ReplicaId(0)])), "the other one comes back all the same: {undone:?}");
    let both = Outcome::Broken { why: "the new one crashed".into(), undo: "the disk is gone".into() };
    assert_eq!(rollout.next(), Next::End(&both));
    rollout.failed("again".into());
    rollout.give_up("late");
    assert_eq!(rollout.next(), Next::End(&both), "it stays ended");
}

#[test]
fn an_undo_has_the_time_of_a_stop_and_of_as_many_starts() {
    let policy = Policy::default();
    let stop = policy.stop.grace + policy.stop.prove;
    let two = vec![ReplicaId(0), ReplicaId(1)];
    assert_eq!(Step::Stop(two.clone()).time_to_undo(&policy), Some(stop + 2 * policy.start.max));
    for step in plan(Strategy::Rolling, &incumbents(3), &[], 4, false) {
        let takes_time = matches!(step, Step::Stop(_) | Step::Start(_) | Step::Commit);
        assert_eq!(step.time_to_undo(&policy).is_some(), takes_time, "{step:?}");
    }
}

#[test]
fn a_probation_judges_the_new_replicas_by_their_own_restarts() {
    let probation = Probation { until: Tick(60), restarts: [(ReplicaId(1), 0), (ReplicaId(2), 7)].into() };
    assert!(probation.fails(ReplicaId(1), 1) && !probation.fails(ReplicaId(1), 0));
    assert!(!probation.fails(ReplicaId(2), 7) && probation.fails(ReplicaId(2), 8));
    assert!(!probation.fails(ReplicaId(0), 9), "it is of the old");
}

#[test]
fn a_rollout_is_given_up_before_its_commit_and_finished_after_it() {
    let steps = plan(Strategy::Overlap, &incumbents(1), &[], 1, false);
    for at in 0..steps.len() {
        let mut rollout = Rollout::new(steps.clone());
        (0..at).for_each(|_| rollout.done());
        let committed = rollout.committed();
        rollout.give_up("something newer is wanted");
        assert_eq!(matches!(rollout.next(), Next::Do(_)), committed);
    }
}

#[test]
fn a_new_replica_never_takes_the_name_of_one_that_is_there() {
    let old = [Incumbent { id: ReplicaId(1), place: 0 }, Incumbent { id: ReplicaId(4), place: 1 }];
    let steps = plan(Strategy::Overlap, &old, &[ReplicaId(2)], 2, false);
    assert!(steps.contains(&Step::Add(vec![(ReplicaId(0), 0), (ReplicaId(3), 1)])), "{steps:?}");
}

proptest! {
    #[test]
    fn no_order_of_answers_breaks_it(
        which in 0usize..4, count in 1u16..5, places in 1u16..5, asleep: bool, answers in proptest::collection::vec(0u8..8, 0..60)
    ) {
        let mut rollout = Rollout::new(plan(STRATEGIES[which], &incumbents(count), &[], places, asleep));
        let mut was_committed = false;
        for answer in answers {
            match answer {
                0 => rollout.failed("no".into()),
                1 => rollout.give_up("enough"),
                _ => rollout.done(),
            }
            prop_assert!(!was_committed || rollout.committed(), "a commit is never taken back");
            was_committed = rollout.committed();
            let undoes = matches!(rollout.next(), Next::Undo(_));
            prop_assert!(!(was_committed && undoes));
        }
    }
}
