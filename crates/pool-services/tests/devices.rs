//! Devices on which something may be wrong: who is kept away, who is told, and how they come back.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::device::DeviceProcess;
use pool_domain::{DeviceHealth, FailureClass, PoolId};
use pool_services::ports::{Holder, Residency};
use pool_services::{Activation, ControlError, Event, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, gpu, spec, until};
use tokio::sync::mpsc;
use tokio::time::Instant;

const GIB: u64 = 1 << 30;

/// A pool on the first device alone.
fn on_first(id: &str) -> PoolSpec {
    PoolSpec { devices: vec!["0".parse().unwrap()], ..spec(id) }
}

fn state(s: &PoolSnapshot) -> &'static str {
    s.replicas[0].state
}

async fn health(m: &PoolManager, index: usize) -> DeviceHealth {
    m.node().await.unwrap().devices[index].0.health.clone()
}

fn told(events: &mut mpsc::Receiver<Event>) -> Vec<&'static str> {
    std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).collect()
}

/// A node whose first device is fenced by the pool `sick`; what leaves nothing behind is launched from now on.
async fn fenced() -> (FakeNode, PoolManager, mpsc::Receiver<Event>, PoolId) {
    let node = FakeNode::default();
    node.engines.script(|s| {
        s.leaves_child = true;
        s.killable = false;
    });
    let (m, events) = node.manage(vec![on_first("sick")]).await;
    let sick: PoolId = "sick".parse().unwrap();
    until(&m, &sick, PoolSnapshot::ready).await;
    node.engines.script(|s| {
        s.leaves_child = false;
        s.killable = true;
    });
    node.engines.crash_all();
    until(&m, &sick, |s| state(s) == "fenced").await;
    // The steward hears of it a moment later.
    tokio::time::sleep(Duration::from_millis(1)).await;
    (node, m, events, sick)
}

#[tokio::test(start_paused = true)]
async fn a_fence_is_visible_and_ends_when_nothing_is_left_after_all() {
    let (node, m, mut events, sick) = fenced().await;
    let DeviceHealth::Fenced(why) = health(&m, 0).await else { panic!("not fenced") };
    assert!(why.contains("`sick`"), "{why}");
    assert_eq!(health(&m, 1).await, DeviceHealth::Ok);
    let on_both = PoolSpec { devices: vec!["0,1".parse().unwrap()], ..spec("other") };
    let plan = m.plan(pool_services::control::PlanRequest::Spec(Box::new(on_both))).await.unwrap();
    assert!(!plan.fits && plan.reason.contains("fenced"), "{plan:?}");
    node.engines.leftovers_end();
    let again = until(&m, &sick, PoolSnapshot::ready).await;
    assert_eq!((again.replicas[0].restart_count, health(&m, 0).await), (1, DeviceHealth::Ok));
    let told = told(&mut events);
    assert!(told.contains(&"fenced") && told.contains(&"stopped") && !told.contains(&"unfenced"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn unfence_believes_a_person_and_saying_it_twice_is_fine() {
    let (node, m, mut events, sick) = fenced().await;
    assert_eq!(m.unfence("7").await, Err(ControlError::DeviceNotFound("7".into())));
    assert_eq!(m.unfence("all").await, Err(ControlError::DeviceNotFound("all".into())));
    m.unfence("1").await.unwrap();
    assert_eq!(state(&m.pool(&sick).await.unwrap()), "fenced", "another device");
    m.unfence(&gpu(0, 0).uuid).await.unwrap();
    let again = until(&m, &sick, PoolSnapshot::ready).await;
    assert_eq!(health(&m, 0).await, DeviceHealth::Ok);
    m.unfence("0").await.unwrap();
    // What was left ends now, and concerns nobody any more.
    let generation = again.replicas[0].generation;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let still = m.pool(&sick).await.unwrap();
    assert_eq!((still.ready(), still.replicas[0].generation), (true, generation));
    let told = told(&mut events);
    assert!(told.contains(&"unfenced") && !told.contains(&"stopped"), "{told:?}");
    assert_eq!(node.engines.launches().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_device_that_is_gone_from_the_bus_can_be_unfenced() {
    let (node, m, _events, sick) = fenced().await;
    node.gpus.change(|i| i.devices.retain(|d| d.index != 0));
    m.unfence(&gpu(0, 0).uuid).await.unwrap();
    // It goes on to its next start, which finds no such device.
    until(&m, &sick, |s| state(s) != "fenced").await;
}

#[tokio::test(start_paused = true)]
async fn a_device_that_several_pools_accuse_gets_nothing_new_until_its_probation_is_over() {
    let node = FakeNode::default();
    let asked = |id: &str| PoolSpec { activation: Activation::OnDemand, ..on_first(id) };
    let auto = PoolSpec { activation: Activation::OnDemand, ..spec("auto") };
    let (m, mut events) = node.manage(vec![on_first("well"), asked("a"), asked("b"), asked("late"), auto]).await;
    let [well, a, b, late, auto]: [PoolId; 5] = ["well", "a", "b", "late", "auto"].map(|id| id.parse().unwrap());
    let first = until(&m, &well, PoolSnapshot::ready).await;
    node.engines.script(|s| {
        s.crash_after = Some(Duration::from_secs(30));
        s.dies_of = Some(FailureClass::DriverError);
    });
    m.preload(&a).await.unwrap();
    until(&m, &a, |s| s.replicas[0].restart_count == 1).await;
    assert_eq!(health(&m, 0).await, DeviceHealth::Ok, "one pool alone");
    m.preload(&b).await.unwrap();
    until(&m, &b, PoolSnapshot::ready).await;
    until(&m, &b, |s| s.last_error().is_some()).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let began = Instant::now();
    let DeviceHealth::Suspect(why) = health(&m, 0).await else { panic!("{:?}", health(&m, 0).await) };
    assert!(why.contains("`a` (driver_error), `b` (driver_error)"), "{why}");
    node.engines.script(|s| {
        s.crash_after = None;
        s.dies_of = None;
    });

    m.preload(&late).await.unwrap();
    let waits = until(&m, &late, |s| state(s) == "waiting").await;
    assert!(waits.replicas[0].reason.contains("suspect"), "{}", waits.replicas[0].reason);
    m.preload(&auto).await.unwrap();
    let elsewhere = until(&m, &auto, PoolSnapshot::ready).await;
    assert_eq!(elsewhere.replicas[0].device_mask, gpu(1, 0).uuid);

    until(&m, &late, PoolSnapshot::ready).await;
    let away = began.elapsed();
    // A crash of an engine that ran there already would have made it longer.
    assert!((Duration::from_secs(115)..Duration::from_secs(180)).contains(&away), "{away:?}");
    for id in [&a, &b] {
        until(&m, id, PoolSnapshot::ready).await;
    }
    assert_eq!(health(&m, 0).await, DeviceHealth::Ok);
    let still = m.pool(&well).await.unwrap();
    assert_eq!((still.ready(), still.replicas[0].generation), (true, first.replicas[0].generation));
    let told = told(&mut events);
    let count = |code| told.iter().filter(|t| **t == code).count();
    assert_eq!((count("device_suspected"), count("device_readmitted")), (1, 1), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_person_may_readmit_a_suspect_device() {
    let node = FakeNode::default();
    node.engines.script(|s| {
        s.crash_after = Some(Duration::from_secs(30));
        s.dies_of = Some(FailureClass::GpuLost);
    });
    let (m, mut events) = node.manage(vec![on_first("a"), on_first("b")]).await;
    let a: PoolId = "a".parse().unwrap();
    until(&m, &a, |s| s.last_error().is_some()).await;
    node.engines.script(|s| s.crash_after = None);
    let waits = until(&m, &a, |s| s.replicas[0].reason_code == "devices").await;
    assert!(waits.replicas[0].reason.contains("suspect"), "{waits:?}");
    let began = Instant::now();
    m.unfence("0").await.unwrap();
    until(&m, &a, PoolSnapshot::ready).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(told(&mut events).contains(&"device_readmitted"));
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_the_daemon_makes_no_device_well() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices.truncate(1));
    let pools = || ["a", "b", "late"].map(|id| PoolSpec { activation: Activation::OnDemand, ..on_first(id) }).to_vec();
    let (m, _events) = node.manage(pools()).await;
    let [a, b, late]: [PoolId; 3] = ["a", "b", "late"].map(|id| id.parse().unwrap());
    node.engines.script(|s| (s.crash_after, s.dies_of) = (Some(Duration::ZERO), Some(FailureClass::DriverError)));
    for id in [&a, &b] {
        m.preload(id).await.unwrap();
        until(&m, id, |s| s.last_error().is_some()).await;
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    let DeviceHealth::Suspect(why) = health(&m, 0).await else { panic!("well") };
    let suspected = Instant::now();
    for id in [&a, &b] {
        m.stop(id).await.unwrap();
    }
    node.engines.script(|s| (s.crash_after, s.dies_of) = (None, None));
    assert!(m.shutdown(Duration::from_secs(60)).await);
    drop(m);

    let (m, _events) = node.manage(pools()).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(health(&m, 0).await, DeviceHealth::Suspect(why));
    m.preload(&late).await.unwrap();
    until(&m, &late, PoolSnapshot::ready).await;
    let away = suspected.elapsed();
    assert!((Duration::from_secs(110)..Duration::from_secs(130)).contains(&away), "{away:?}");
}

#[tokio::test(start_paused = true)]
async fn a_start_waits_for_memory_that_has_not_come_back_whoever_holds_it() {
    let node = FakeNode::default();
    let used = |bytes: u64| {
        node.gpus.change(|i| {
            i.devices.truncate(1);
            let device = &mut i.devices[0];
            (device.vram_total, device.vram_used, device.vram_free) = (10 * GIB, bytes, 10 * GIB - bytes);
        });
    };
    used(0);
    let big = PoolSpec { vram: Some(6 * GIB), ..on_first("big") };
    let (m, _events) = node.manage(vec![big]).await;
    let id: PoolId = "big".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    used(6 * GIB);
    node.engines.crash_all();
    let waits = until(&m, &id, |s| s.replicas[0].reason_code == "vram").await;
    assert_eq!(node.engines.launches().len(), 1, "{waits:?}");
    // It lags, and somebody else takes some of it meanwhile: less and less is free.
    for held in [6, 7, 9, 5] {
        used(held * GIB);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(node.engines.launches().len(), 1, "with {held} GiB in use");
    }
    used(3 * GIB);
    until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!(node.engines.launches().len(), 2);
}

/// A node with one provable device of 10 GiB, on which its engines hold what is set here: what is used, and by whom.
fn provable(node: &FakeNode, used: u64, holders: &[(u32, u64)]) {
    node.gpus.change(|i| {
        i.devices.truncate(1);
        let device = &mut i.devices[0];
        (device.vram_total, device.vram_used, device.vram_free) = (10 * GIB, used * GIB, (10 - used) * GIB);
    });
    let holder = |(pid, bytes): &(u32, u64)| Holder { uuid: gpu(0, 0).uuid, pid: *pid, bytes: bytes * GIB };
    node.gpus.set_residency(Residency::Provable(holders.iter().map(holder).collect()));
}

#[tokio::test(start_paused = true)]
async fn what_an_engine_takes_beyond_its_promise_later_is_ours_and_promised_to_nobody_else() {
    let node = FakeNode::default();
    provable(&node, 0, &[]);
    node.engines.script(|s| s.load = Duration::from_secs(5));
    let late = PoolSpec { vram: Some(4 * GIB), activation: Activation::OnDemand, ..on_first("late") };
    let (m, _events) = node.manage(vec![PoolSpec { vram: Some(4 * GIB), ..on_first("big") }, late]).await;
    let [big, late]: [PoolId; 2] = ["big", "late"].map(|id| id.parse().unwrap());
    let pid = until(&m, &big, |s| s.replicas[0].live).await.replicas[0].pid.unwrap();
    provable(&node, 4, &[(pid, 4)]);
    until(&m, &big, PoolSnapshot::ready).await;
    // It grows, and somebody comes whom nobody lists.
    provable(&node, 8, &[(pid, 7)]);
    let process = DeviceProcess { pid, bytes: 7 * GIB, name: None, ours: false };
    node.gpus.change(|i| i.devices[0].details.processes = vec![process]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (device, ours) = m.node().await.unwrap().devices[0].clone();
    assert_eq!((ours, device.vram_foreign), (7 * GIB, GIB));
    m.preload(&late).await.unwrap();
    let waits = until(&m, &late, |s| state(s) == "waiting").await;
    assert!(waits.replicas[0].reason.contains("2.0 GiB left of the 4.0 GiB"), "{}", waits.replicas[0].reason);
    assert!(m.pool(&big).await.unwrap().ready());
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_does_not_answer_ends_no_start_and_fences_no_device() {
    let node = FakeNode::default();
    provable(&node, 0, &[]);
    node.engines.script(|s| s.load = Duration::from_secs(5));
    let (m, mut events) = node.manage(vec![on_first("big")]).await;
    let big: PoolId = "big".parse().unwrap();
    let pid = until(&m, &big, |s| s.replicas[0].live).await.replicas[0].pid.unwrap();
    let silent = || node.gpus.set_residency(Residency::Unknown("the driver does not answer".into()));
    silent();
    until(&m, &big, |s| s.replicas[0].reason.contains("waits for the driver to prove its memory")).await;
    // Longer than any start may take.
    tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
    assert_eq!(state(&m.pool(&big).await.unwrap()), "warming");
    provable(&node, 1, &[(pid, 1)]);
    let ready = until(&m, &big, PoolSnapshot::ready).await;
    assert_eq!((ready.last_error(), node.engines.launches().len()), (None, 1));
    silent();
    m.stop(&big).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
    let waits = m.pool(&big).await.unwrap();
    assert_eq!((state(&waits), waits.replicas[0].reason_code), ("stopping", "memory"), "{waits:?}");
    provable(&node, 0, &[]);
    until(&m, &big, |s| state(s) == "idle").await;
    let told = told(&mut events);
    assert!(!told.contains(&"fenced") && !told.contains(&"device_suspected"), "{told:?}");
}

/// From now on the device is empty, and whoever is launched later is listed there.
fn it_comes_back(node: &FakeNode) {
    let next = u32::try_from(node.engines.launches().len()).unwrap();
    provable(node, 0, &[(next, 0), (next + 1, 0)]);
}

/// A pool that holds 6 of 10 GiB, after which its engine died and its memory stayed: nobody is listed for it.
async fn memory_stays(pools: Vec<PoolSpec>) -> (FakeNode, PoolManager, mpsc::Receiver<Event>, PoolId) {
    let node = FakeNode::default();
    provable(&node, 0, &[]);
    node.engines.script(|s| s.load = Duration::from_secs(5));
    let (m, events) = node.manage(pools).await;
    let id: PoolId = "big".parse().unwrap();
    let live = until(&m, &id, |s| s.replicas[0].live).await;
    provable(&node, 6, &[(live.replicas[0].pid.unwrap(), 6)]);
    until(&m, &id, PoolSnapshot::ready).await;
    provable(&node, 6, &[]);
    node.engines.crash_all();
    (node, m, events, id)
}

fn big() -> PoolSpec {
    PoolSpec { vram: Some(6 * GIB), ..on_first("big") }
}

#[tokio::test(start_paused = true)]
async fn memory_that_does_not_come_back_fences_its_device_until_it_does() {
    let small = PoolSpec { activation: Activation::OnDemand, vram: Some(GIB), ..on_first("small") };
    let (node, m, mut events, id) = memory_stays(vec![big(), small]).await;
    let awaited = until(&m, &id, |s| s.replicas[0].reason_code == "memory").await;
    assert_eq!((state(&awaited), awaited.replicas[0].live), ("stopping", false));
    let began = Instant::now();
    let fenced = until(&m, &id, |s| state(s) == "fenced").await;
    assert_eq!(began.elapsed().as_secs(), 10);
    assert!(fenced.replicas[0].reason.contains("memory has not come back"), "{fenced:?}");
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(matches!(health(&m, 0).await, DeviceHealth::Fenced(_)));
    assert_eq!(m.node().await.unwrap().devices[0].1, 6 * GIB, "its reservation stands");
    // There would be room, but not for a newcomer.
    let newcomer: PoolId = "small".parse().unwrap();
    m.preload(&newcomer).await.unwrap();
    until(&m, &newcomer, |s| s.replicas[0].reason.contains("fenced")).await;
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert_eq!((state(&m.pool(&id).await.unwrap()), node.engines.launches().len()), ("fenced", 1));
    it_comes_back(&node);
    until(&m, &id, PoolSnapshot::ready).await;
    until(&m, &newcomer, PoolSnapshot::ready).await;
    assert_eq!(health(&m, 0).await, DeviceHealth::Ok);
    let told = told(&mut events);
    assert!(told.contains(&"fenced") && told.contains(&"stopped") && !told.contains(&"unfenced"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn memory_that_comes_back_late_fences_nothing_and_a_person_may_say_that_it_is_back() {
    let (node, m, mut events, id) = memory_stays(vec![big()]).await;
    until(&m, &id, |s| s.replicas[0].reason_code == "memory").await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    it_comes_back(&node);
    until(&m, &id, PoolSnapshot::ready).await;
    assert!(!told(&mut events).contains(&"fenced"));

    let (node, m, mut events, id) = memory_stays(vec![big()]).await;
    until(&m, &id, |s| state(s) == "fenced").await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    m.unfence("0").await.unwrap();
    // Whoever said so is believed; that there is no room for the next start is another matter.
    until(&m, &id, |s| s.replicas[0].reason_code == "vram").await;
    assert_eq!(health(&m, 0).await, DeviceHealth::Ok);
    assert!(told(&mut events).contains(&"unfenced"));
    it_comes_back(&node);
    until(&m, &id, PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_later_daemon_knows_that_memory_did_not_come_back() {
    let (node, m, _events, id) = memory_stays(vec![big()]).await;
    until(&m, &id, |s| state(s) == "fenced").await;
    drop(m);
    let small = PoolSpec { vram: Some(GIB), ..on_first("a") };
    let (m, _events) = node.manage(vec![small, big()]).await;
    until(&m, &id, |s| state(s) == "fenced").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!m.pool(&"a".parse().unwrap()).await.unwrap().ready(), "a newcomer");
    assert_eq!(node.engines.launches().len(), 1);
    it_comes_back(&node);
    until(&m, &id, PoolSnapshot::ready).await;
    until(&m, &"a".parse().unwrap(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn starts_on_one_device_take_turns_and_do_not_wait_for_another_one_s() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(20));
    let elsewhere = PoolSpec { devices: vec!["1".parse().unwrap()], ..spec("elsewhere") };
    let (m, _events) = node.manage(vec![on_first("a"), on_first("b"), on_first("c"), elsewhere]).await;
    for id in ["a", "b", "c", "elsewhere"] {
        until(&m, &id.parse().unwrap(), PoolSnapshot::ready).await;
    }
    let launches: Vec<_> = node.engines.launches().iter().map(|(at, _)| *at).collect();
    let gaps: Vec<_> = launches.windows(2).map(|w| (w[1] - w[0]).as_secs()).collect();
    assert_eq!(gaps, [0, 20, 20]);
}
