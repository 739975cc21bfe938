//! A fault at every step of a reload and at every step of its undo, for every strategy: in the end there is exactly the
//! old or exactly the new, or both reasons are told.
//!
//! The steps are those of `rollout::plan` itself, and what can go wrong with one is said for each kind of step, so a new
//! kind does not compile before somebody says it here.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::failure::Exit;
use pool_domain::rollout::{Incumbent, Step, Strategy, plan};
use pool_domain::{Failure, FailureClass, PoolId, ReplicaId};
use pool_services::control::ReloadRequest;
use pool_services::{
    ControlError, Declared, OperationState, PoolControl, PoolManager, PoolSnapshot, PoolSpec, Restored, Source,
};
use pool_testkit::{FakeNode, Process, Script, spec, until};
use tokio::time::sleep;

const LONG: Duration = Duration::from_secs(360_000);
const STRATEGIES: [Strategy; 3] = [Strategy::InPlace, Strategy::Overlap, Strategy::Rolling];
const SIZES: [u16; 2] = [1, 3];

/// What goes wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NotStaged,
    PreflightFails,
    /// Something of the old engine is left, for ever or until it ends by itself.
    OldStays,
    OldStaysForAWhile,
    /// The task that owns the replica meets a bug.
    DriverDies,
    LeaseStays,
    LaunchFails,
    Crashes,
    WrongModel,
    NeverServes,
    Refused,
    /// The disk says no and has it all the same.
    RefusedAndThere,
}

fn faults(step: &Step) -> &'static [Fault] {
    use Fault::*;
    match step {
        Step::Verify => &[NotStaged, PreflightFails],
        Step::Stop(_) => &[OldStays, OldStaysForAWhile, DriverDies, LeaseStays],
        Step::Start(_) => &[LaunchFails, Crashes, WrongModel, NeverServes],
        Step::Commit => &[Refused, RefusedAndThere],
        // It is over already, but something of it may be left.
        Step::Retire(_) => &[OldStays, OldStaysForAWhile, DriverDies],
        // They are words between tasks: nothing that can be had or not.
        Step::Change(_) | Step::Add(_) | Step::Flip { .. } => &[],
    }
}

/// What goes wrong when a step is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undo {
    OldLaunchFails,
    OldCrashes,
    OldIsAnother,
    OldNeverServes,
    NewStays,
    NewDriverDies,
    DiskStaysIll,
}

fn faults_of_undo(step: &Step) -> &'static [Undo] {
    use Undo::*;
    match step {
        Step::Stop(_) => &[OldLaunchFails, OldCrashes, OldIsAnother, OldNeverServes],
        Step::Start(_) => &[NewStays, NewDriverDies],
        Step::Commit => &[DiskStaysIll],
        Step::Verify | Step::Change(_) | Step::Add(_) | Step::Flip { .. } | Step::Retire(_) => &[],
    }
}

/// The last of those a step is about, so that with more than one the others are done.
fn whose(step: &Step) -> ReplicaId {
    match step {
        Step::Stop(ids) | Step::Start(ids) | Step::Retire(ids) | Step::Change(ids) => *ids.last().unwrap(),
        Step::Verify | Step::Add(_) | Step::Commit | Step::Flip { .. } => ReplicaId(0),
    }
}

fn chat() -> PoolId {
    "chat".parse().unwrap()
}

fn old(replicas: u16) -> PoolSpec {
    let mut spec = PoolSpec { replicas, args: vec!["--old".into()], ..spec("chat") };
    spec.reload.probation = Duration::ZERO;
    // The old one is given its devices first.
    spec.policy.start.stall = Duration::from_secs(60);
    spec.policy.start.max = Duration::from_secs(120);
    spec
}

fn new(replicas: u16) -> PoolSpec {
    PoolSpec { model: "stub:other".parse().unwrap(), args: vec!["--new".into()], ..old(replicas) }
}

#[derive(Debug)]
struct Case {
    strategy: Strategy,
    replicas: u16,
    /// Which step, and what goes wrong with it.
    fault: Option<(usize, Fault)>,
    /// The same on the way back.
    undo: Option<(usize, Undo)>,
}

impl Case {
    fn steps(&self) -> Vec<Step> {
        let old: Vec<_> = (0..self.replicas).map(|n| Incumbent { id: ReplicaId(n), place: n }).collect();
        plan(self.strategy, &old, &[], self.replicas, false)
    }

    fn committed(&self) -> bool {
        let steps = self.steps();
        let commit = steps.iter().position(|s| *s == Step::Commit).unwrap();
        self.fault.is_none_or(|(at, _)| at > commit)
    }

    /// Whether the way back fails too. What may be left of a newcomer is beside the old one.
    fn breaks(&self) -> bool {
        let newcomer = |at: usize| whose(&self.steps()[at]).0 >= self.replicas;
        let undo = self.undo.is_some_and(|(at, undo)| match undo {
            Undo::DiskStaysIll => false,
            Undo::NewStays => !newcomer(at),
            _ => true,
        });
        let fault = self.fault.is_some_and(|(_, fault)| matches!(fault, Fault::OldStays | Fault::DriverDies));
        !self.committed() && (undo || fault)
    }

    /// Words of the reason.
    fn why(&self) -> &'static str {
        let (at, fault) = self.fault.unwrap();
        // It dies of ending what failed, which is seen first.
        if self.undo == Some((at, Undo::NewDriverDies)) && matches!(self.steps()[at], Step::Start(_)) {
            return "the driver of";
        }
        match fault {
            Fault::NotStaged => "no such model",
            Fault::PreflightFails => "no such flag",
            Fault::OldStays | Fault::OldStaysForAWhile => "something of the old engine may be left",
            Fault::DriverDies => "the driver of",
            Fault::LeaseStays => "leases were still held",
            Fault::LaunchFails | Fault::Crashes => "crash",
            Fault::WrongModel => "it serves third",
            Fault::NeverServes => "start_timeout",
            Fault::Refused | Fault::RefusedAndThere => "could not write",
        }
    }

    fn plant(&self, node: &FakeNode) {
        let steps = self.steps();
        let script = |id: ReplicaId, model: &str, nth: u32, change: fn(&mut Script)| {
            node.engines.script_of_launch(id, model, nth, change);
        };
        let stays = |s: &mut Script| (s.leaves_child, s.killable) = (true, false);
        if let Some((at, fault)) = self.fault {
            let id = whose(&steps[at]);
            match fault {
                Fault::NotStaged => node.models.missing("other"),
                Fault::PreflightFails => node.engines.script_of("other", |s| {
                    s.preflight = Some(Failure::new(FailureClass::Config, "no such flag"));
                }),
                Fault::OldStays | Fault::OldStaysForAWhile => script(id, "tiny", 1, stays),
                Fault::DriverDies => script(id, "tiny", 1, |s| s.panics = true),
                Fault::LaunchFails => script(id, "other", 1, |s| s.launch = Some(Failure::crash(Exit::Unknown))),
                Fault::Crashes => script(id, "other", 1, |s| s.crash_after = Some(Duration::from_millis(50))),
                Fault::WrongModel => script(id, "other", 1, |s| s.model = Some("third".into())),
                Fault::NeverServes => script(id, "other", 1, |s| s.serves = false),
                // As soon as the pool serves.
                Fault::LeaseStays | Fault::Refused | Fault::RefusedAndThere => {}
            }
        }
        if let Some((at, undo)) = self.undo {
            let id = whose(&steps[at]);
            match undo {
                Undo::OldLaunchFails => script(id, "tiny", 2, |s| s.launch = Some(Failure::crash(Exit::Unknown))),
                Undo::OldCrashes => script(id, "tiny", 2, |s| s.crash_after = Some(Duration::from_millis(50))),
                Undo::OldIsAnother => script(id, "tiny", 2, |s| s.model = Some("fourth".into())),
                Undo::OldNeverServes => script(id, "tiny", 2, |s| s.serves = false),
                Undo::NewStays => script(id, "other", 1, stays),
                Undo::NewDriverDies => script(id, "other", 1, |s| s.panics = true),
                Undo::DiskStaysIll => {}
            }
        }
    }
}

/// What is to be the same again: the pool as it is shown, and what it really is.
#[derive(Debug, PartialEq)]
struct Picture {
    shown: (String, u64, Vec<(u16, &'static str, String)>),
    document: (u64, String),
    stored: Option<String>,
    processes: Vec<(u16, String, Vec<String>, String)>,
}

fn runs(p: &Process) -> (u16, String, Vec<String>, String) {
    (p.key.replica.0, p.model.clone(), p.args.clone(), p.mask.clone())
}

impl Picture {
    /// Without what is fenced: it serves no more, and waits for its end to be proved.
    async fn of(node: &FakeNode, m: &PoolManager) -> Self {
        let s = m.pool(&chat()).await.unwrap();
        let there: Vec<_> = s.replicas.iter().filter(|r| r.state != "fenced").collect();
        let processes: Vec<_> = node.engines.processes();
        for r in &there {
            let its: Vec<_> = processes.iter().filter(|p| p.key.replica == r.id).map(|p| p.generation).collect();
            assert_eq!(its, if r.live { vec![r.generation] } else { vec![] }, "{s:#?}");
        }
        let known = |p: &&Process| s.replicas.iter().any(|r| r.id == p.key.replica);
        assert!(processes.iter().all(|p| known(&p)), "{processes:?}: {s:#?}");
        Self {
            shown: (
                s.model.clone(),
                s.revision,
                there.iter().map(|r| (r.id.0, r.state, r.device_mask.clone())).collect(),
            ),
            document: m.document(&chat()).await.unwrap(),
            stored: node.ledger.stored(&chat()).map(|s| s.document),
            processes: processes.iter().filter(|p| there.iter().any(|r| r.id == p.key.replica)).map(runs).collect(),
        }
    }
}

async fn run(case: &Case) {
    let node = FakeNode::default();
    case.plant(&node);
    let file =
        Declared { spec: old(case.replicas), document: "old".into(), source: Source::File { digest: "d".into() } };
    let (m, mut events) = node.manage_declared(vec![Restored::from(file)], Duration::ZERO).await;
    let all = |s: &PoolSnapshot| s.replicas.len() == usize::from(case.replicas) && s.replicas.iter().all(|r| r.ready);
    until(&m, &chat(), all).await;
    let before = Picture::of(&node, &m).await;
    let fault = case.fault.map(|(_, fault)| fault);
    let mut slots = Vec::new();
    match fault {
        // On every one of them: whichever is drained first.
        Some(Fault::LeaseStays) => {
            let (at, _) = case.fault.unwrap();
            let id = whose(&case.steps()[at]);
            let all: Vec<_> = (0..4 * case.replicas).map(|_| m.allocate_lease(&chat()).unwrap()).collect();
            slots = all.into_iter().filter(|(key, _)| key.replica == id).map(|(_, slot)| slot).collect();
        }
        Some(Fault::Refused) => node.ledger.refuse_pools(true),
        Some(Fault::RefusedAndThere) => node.ledger.lie_about_pools(true),
        _ => {}
    }
    let deadline = if slots.is_empty() { LONG } else { Duration::from_secs(120) };
    let request = ReloadRequest {
        declared: Some((new(case.replicas), "new".into())),
        strategy: Some(case.strategy),
        deadline: Some(deadline),
        ..ReloadRequest::default()
    };
    let state = match m.reload(&chat(), request).await {
        Ok(operation) => {
            if fault == Some(Fault::OldStaysForAWhile) {
                sleep(Duration::from_secs(60)).await;
                node.engines.leftovers_end();
            }
            m.wait_operation(&operation.id, LONG).await.unwrap().state
        }
        // Refused at the door.
        Err(ControlError::Refused { detail, .. }) => OperationState::Failed(detail),
        Err(other) => panic!("{case:?}: {other:?}"),
    };
    let what = format!("{case:?} ended as {state:?}");
    drop(slots);
    if !matches!(case.undo, Some((_, Undo::DiskStaysIll))) {
        node.ledger.refuse_pools(false);
        node.ledger.lie_about_pools(false);
    }
    sleep(Duration::from_secs(30)).await;
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.push(event.code());
    }
    match &state {
        OperationState::Succeeded(how) => {
            assert!(case.committed() && how == "reloaded", "{what}");
            ended_in_the_new(case, &node, &m, &what).await;
            assert!(told.contains(&"reloaded"), "{what}: {told:?}");
        }
        OperationState::Failed(why) if case.breaks() => {
            assert!(why.contains(case.why()) && why.contains("so did the way back"), "{what}");
            assert!(told.contains(&"reload_broken"), "{what}: {told:?}");
            ended_in_neither(case, &node, &m, &what, &before).await;
        }
        OperationState::Failed(why) => {
            assert!(!case.committed() && why.contains(case.why()) && !why.contains("way back"), "{what}");
            assert_eq!(Picture::of(&node, &m).await, before, "{what}");
            assert!(matches!(m.rollback(&chat()).await, Err(ControlError::Conflict(_))), "{what}");
            let door = matches!(fault, Some(Fault::NotStaged | Fault::PreflightFails));
            assert!(told.contains(&"reload_undone") || door, "{what}: {told:?}");
            let _slot = m.allocate_lease(&chat()).unwrap();
        }
        OperationState::Running => panic!("{what}"),
    }
}

async fn ended_in_the_new(case: &Case, node: &FakeNode, m: &PoolManager, what: &str) {
    let is = Picture::of(node, m).await;
    assert_eq!((is.shown.0.as_str(), is.shown.1, &is.document), ("stub:other", 2, &(2, "new".into())), "{what}");
    assert_eq!(is.stored.as_deref(), Some("new"), "{what}");
    if matches!(case.fault, Some((_, Fault::DriverDies))) {
        // Nobody sees to what it had any more, which the daemon says; those that serve do so.
        let serve = is.shown.2.iter().filter(|(_, state, _)| *state == "ready").count();
        assert_eq!(serve, usize::from(case.replicas), "{what}: {is:#?}");
        return;
    }
    assert!(is.shown.2.iter().all(|(_, state, _)| *state == "ready"), "{what}: {is:#?}");
    assert_eq!((is.shown.2.len(), is.processes.len()), (case.replicas.into(), case.replicas.into()), "{what}");
    assert!(is.processes.iter().all(|(_, model, args, _)| model == "other" && args == &["--new"]), "{what}: {is:#?}");
    let _slot = m.allocate_lease(&chat()).unwrap();
}

/// What the pool says that it is, is the old; what serves is, too; the others say both reasons, or may be there still.
async fn ended_in_neither(case: &Case, node: &FakeNode, m: &PoolManager, what: &str, before: &Picture) {
    let s = m.pool(&chat()).await.unwrap();
    assert_eq!((&s.model, s.revision), (&before.shown.0, before.shown.1), "{what}");
    assert_eq!(node.ledger.stored(&chat()), None, "{what}");
    let dead = |fault| matches!(fault, Some((_, Fault::DriverDies)));
    if dead(case.fault) || matches!(case.undo, Some((_, Undo::NewDriverDies))) {
        return;
    }
    let processes = node.engines.processes();
    for r in &s.replicas {
        let its = processes.iter().find(|p| p.key.replica == r.id);
        match r.state {
            "ready" => {
                assert!(before.processes.contains(&runs(its.unwrap())), "{what}: {its:?} is not of {before:#?}");
            }
            "failed" => {
                assert!(its.is_none(), "{what}: {its:?}");
                assert!(r.reason.contains(case.why()) && r.reason.contains("so did the way back"), "{what}: {s:#?}");
            }
            "fenced" => {}
            other => panic!("{what}: {} is {other}: {s:#?}", r.id),
        }
    }
    assert_eq!(s.replicas.iter().filter(|r| r.id.0 < case.replicas).count(), usize::from(case.replicas), "{what}");
}

fn with_paused_time<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(what)
}

/// Returns how many cases there were.
fn all(strategy: Strategy) -> usize {
    let mut ran = 0;
    let mut failed = Vec::new();
    let mut go = |case: Case| {
        ran += 1;
        let outcome = std::panic::catch_unwind(|| with_paused_time(run(&case)));
        if outcome.is_err() {
            failed.push(format!("{case:?}"));
        }
    };
    for replicas in SIZES {
        let plain = |fault, undo| Case { strategy, replicas, fault, undo };
        go(plain(None, None));
        let steps = plain(None, None).steps();
        for (at, step) in steps.iter().enumerate() {
            for fault in faults(step) {
                let case = plain(Some((at, *fault)), None);
                let committed = case.committed();
                go(case);
                for back in (0..=at).rev().filter(|_| !committed) {
                    // What the step that failed left is its own fault, and no driver dies twice.
                    let own = |undo: &Undo| match fault {
                        // No driver dies twice.
                        Fault::DriverDies => true,
                        // What is left ends all at once.
                        Fault::OldStaysForAWhile if *undo == Undo::NewStays => true,
                        Fault::OldStays | Fault::OldStaysForAWhile | Fault::LeaseStays => back == at,
                        // There is nothing that could stay.
                        Fault::LaunchFails | Fault::Crashes => back == at,
                        _ => false,
                    };
                    for undo in faults_of_undo(&steps[back]).iter().filter(|undo| !own(undo)) {
                        go(plain(Some((at, *fault)), Some((back, *undo))));
                    }
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} of {ran} failed:\n{}", failed.len(), failed.join("\n"));
    ran
}

#[test]
fn in_place_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons() {
    assert!(all(STRATEGIES[0]) > 50);
}

#[test]
fn with_overlap_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons() {
    assert!(all(STRATEGIES[1]) > 30);
}

#[test]
fn rolling_a_fault_at_any_step_or_undo_ends_in_the_old_or_the_new_or_says_both_reasons() {
    assert!(all(STRATEGIES[2]) > 150);
}
