//! The transition function, tried out: what every event does in every state.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use pool_domain::failure::Exit;
use pool_domain::lifecycle::{
    Action, Command, Event, Fact, Launch, Left, OnDeadline, Policy, Proof, Replica, State, StopStage, Then, Wait,
};
use pool_domain::{Draw, Failure, FailureClass, Generation, Tick};

const GENERATION: Generation = Generation(1);

fn proof() -> Proof {
    Proof { residency: "vram", model: "m".into(), slots: 1, first_unit_ms: 1 }
}

fn crash() -> Failure {
    Failure::crash(Exit::Code(1))
}

fn config() -> Failure {
    Failure::new(FailureClass::Config, "")
}

/// One or more replicas of each state, for everything that makes a difference inside of it. Every deadline is due.
fn states() -> Vec<State> {
    let at = Tick(0);
    let mut all = vec![State::Idle, State::Staging { since: at }, State::Preparing { since: at }];
    for why in [
        Wait::Backoff { until: at },
        Wait::Breaker { until: at },
        Wait::Devices { detail: String::new() },
        Wait::Vram { detail: String::new(), possible_at: None },
    ] {
        all.push(State::Waiting { since: at, why });
    }
    for launch in [Launch::Asked, Launch::Running] {
        all.push(State::Starting { since: at, launch, stall_at: at, max_at: at });
    }
    all.push(State::Warming { since: at, stall_at: at, max_at: at });
    for misses in [0, 1] {
        all.push(State::Ready { since: at, proof: proof(), misses });
    }
    all.push(State::Suspect { since: at, ready_since: at, proof: proof(), misses: 2, failure: config() });
    for on_deadline in [OnDeadline::Force, OnDeadline::Abort] {
        all.push(State::Draining {
            since: at,
            ready_since: at,
            proof: proof(),
            deadline: at,
            on_deadline,
            suspect: None,
        });
    }
    for then in
        [Then::Idle, Then::Start, Then::Restart, Then::Wait(Wait::Backoff { until: far() }), Then::Fail(config())]
    {
        for stage in [
            StopStage::Launching { kill_at: at },
            StopStage::Term { kill_at: at },
            StopStage::Kill { fence_at: at },
            StopStage::Memory { fence_at: at },
        ] {
            all.push(State::Stopping { since: at, stage, then: then.clone() });
        }
        for left in [Left::Processes, Left::Memory] {
            all.push(State::Fenced { since: at, left, then: then.clone() });
        }
    }
    all.push(State::Failed { since: at, failure: config() });
    all.push(State::Adopting { since: at, ready_since: None });
    all
}

fn now() -> Tick {
    Tick(0) + Duration::from_secs(1)
}

fn far() -> Tick {
    Tick(0) + Duration::from_secs(3600)
}

fn events() -> Vec<(&'static str, Event)> {
    let command = |name, c| (name, Event::Command(c));
    let fact = |name, f| (name, Event::Engine(GENERATION, f));
    let minute = Duration::from_secs(60);
    vec![
        command("start", Command::Start),
        command("wake", Command::Wake),
        command("drain", Command::Drain { deadline: minute, on_deadline: OnDeadline::Force }),
        command("stop", Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }),
        command("resume", Command::Resume),
        command("reset breaker", Command::ResetBreaker),
        command("unfence", Command::Unfence),
        command("unblocked", Command::Unblocked),
        command("adopt", Command::Adopt { generation: GENERATION, ready_since: None }),
        fact("staged", Fact::Staged),
        fact("prepared", Fact::Prepared),
        fact("blocked", Fact::Blocked(Wait::Vram { detail: String::new(), possible_at: None })),
        fact("unstartable", Fact::Unstartable(crash())),
        fact("unstartable for good", Fact::Unstartable(config())),
        fact("launched", Fact::Launched),
        fact("launch failed", Fact::LaunchFailed(crash())),
        fact("launch failed for good", Fact::LaunchFailed(config())),
        fact("port taken", Fact::LaunchFailed(Failure::new(FailureClass::PortConflict, ""))),
        fact("progress", Fact::Progress),
        fact("driver silent", Fact::Unprovable),
        fact("serving", Fact::Serving),
        fact("proved", Fact::Proved(proof())),
        fact("not proved", Fact::Unproved(crash())),
        fact("healthy", Fact::Healthy),
        fact("missed", Fact::Missed(Failure::new(FailureClass::Health, ""))),
        fact("exited", Fact::Exited(crash())),
        fact("gone", Fact::Gone),
        fact("leases done", Fact::LeasesDone),
        fact("adopted, ready", Fact::Adopted(Some(proof()))),
        fact("adopted, starting", Fact::Adopted(None)),
        fact("not adopted", Fact::NotAdopted(crash())),
        fact("given up", Fact::GivenUp(crash())),
        ("deadline", Event::Timer),
    ]
}

/// What the variants of a state do on one event: where they go and what they ask for.
type Row = (usize, usize, &'static str, Vec<Action>);

fn rows(events: &[(&'static str, Event)]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for state in states() {
        for (e, (_, event)) in events.iter().enumerate() {
            let mut replica = Replica::new(GENERATION);
            replica.state = state.clone();
            let before = replica.clone();
            let actions = replica.step(event.clone(), now(), Draw::new(0.5), &Policy::default());
            let from = State::CODES.iter().position(|c| *c == state.code()).unwrap_or_default();
            let row = (from, e, replica.state.code(), actions);
            if (before.state != replica.state || !row.3.is_empty()) && !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    rows.sort_by_key(|r| (r.0, r.1));
    rows
}

/// `docs/lifecycle.md`
pub(crate) fn markdown() -> String {
    let events = events();
    let rows = rows(&events);
    let mut edges: BTreeMap<(usize, &str), BTreeSet<usize>> = BTreeMap::new();
    for (from, event, to, _) in &rows {
        if State::CODES[*from] != *to {
            edges.entry((*from, to)).or_default().insert(*event);
        }
    }
    let mut out = String::from(
        "# The lifecycle of a replica\n\n\
         Generated by `cargo xtask codegen` from `pool_domain::lifecycle`: every event was tried in every state.\n\n\
         ```mermaid\nstateDiagram-v2\n    [*] --> idle\n",
    );
    for ((from, to), labels) in &edges {
        let labels: Vec<&str> = labels.iter().map(|e| events[*e].0).collect();
        let _ = writeln!(out, "    {} --> {to}: {}", State::CODES[*from], labels.join(", "));
    }
    out.push_str(
        "```\n\nWhat is not in the table changes nothing. Several rows for one event depend on what the state holds.\n\n\
         | state | event | next state | actions |\n| --- | --- | --- | --- |\n",
    );
    for (from, event, to, actions) in &rows {
        let actions: Vec<String> = actions.iter().map(|a| format!("{a:?}")).collect();
        let _ = writeln!(out, "| {} | {} | {to} | {} |", State::CODES[*from], events[*event].0, actions.join(", "));
    }
    out
}
