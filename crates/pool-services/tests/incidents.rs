//! What becomes of engines when the driver says something of their device.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::charges::Said;
use pool_domain::device::{MigSlice, Remap};
use pool_domain::xid::{XidAction, XidTable};
use pool_domain::{DeviceHealth, DeviceSnapshot, FailureClass, PoolId, Verdict};
use pool_services::ports::GpuProbe;
use pool_services::{Activation, Event, EventKind, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, gpu, spec, until};
use tokio::sync::mpsc;
use tokio::time::Instant;

fn on(id: &str, device: &str) -> PoolSpec {
    PoolSpec { devices: vec![device.parse().unwrap()], ..spec(id) }
}

fn id(name: &str) -> PoolId {
    name.parse().unwrap()
}

fn first() -> String {
    gpu(0, 0).uuid
}

fn state(s: &PoolSnapshot) -> &'static str {
    s.replicas[0].state
}

async fn device(m: &PoolManager, uuid: &str) -> DeviceSnapshot {
    let node = m.node().await.unwrap();
    node.devices.into_iter().map(|(d, _)| d).find(|d| d.uuid == uuid).unwrap()
}

/// Two pools on the first device, one on the second, all Ready.
async fn serving() -> (FakeNode, PoolManager, mpsc::Receiver<Event>) {
    let node = FakeNode::default();
    let (m, events) = node.manage(vec![on("a", "0"), on("b", "0"), on("far", "1")]).await;
    for name in ["a", "b", "far"] {
        until(&m, &id(name), PoolSnapshot::ready).await;
    }
    (node, m, events)
}

/// A moment for the steward to hear, and to be heard.
async fn shortly() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

async fn untouched(m: &PoolManager, name: &str) {
    let pool = m.pool(&id(name)).await.unwrap();
    assert_eq!((pool.ready(), pool.replicas[0].generation.0), (true, 1), "{pool:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_error_of_an_engine_restarts_the_engines_of_its_device_and_no_other() {
    for xid in [94, 13, 31] {
        let (node, m, mut events) = serving().await;
        node.gpus.say(&first(), Said::Xid(xid));
        for name in ["a", "b"] {
            let again = until(&m, &id(name), |s| s.ready() && s.replicas[0].generation.0 == 2).await;
            let error = again.last_error().unwrap();
            assert_eq!(error.class, FailureClass::DriverError);
            assert!(error.detail.contains(&format!("XID {xid}")), "{}", error.detail);
        }
        untouched(&m, "far").await;
        let stands = device(&m, &first()).await;
        assert_eq!((stands.health, stands.verdict), (DeviceHealth::Ok, Verdict::None), "the device stays");
        let counted = m.node().await.unwrap().xids;
        assert_eq!((counted[0].xid, counted[0].count), (xid, 1));
        let told: Vec<Event> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let incident = told.iter().find(|e| e.code() == "device_incident").unwrap();
        let EventKind::DeviceIncident { verdict, action, .. } = &incident.kind else { panic!() };
        assert_eq!((*verdict, *action), (Verdict::RestartApp, XidAction::RestartEngine));
        assert!(!told.iter().any(|e| e.code() == "device_suspected"), "one error is no suspicion");
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_has_to_be_reset_is_drained_fenced_and_used_again_when_it_was() {
    let node = FakeNode::default();
    let asked = PoolSpec { activation: Activation::OnDemand, ..on("asked", "0") };
    let (m, mut events) = node.manage(vec![on("fixed", "0"), spec("auto"), on("far", "1"), asked]).await;
    until(&m, &id("fixed"), PoolSnapshot::ready).await;
    let auto = until(&m, &id("auto"), PoolSnapshot::ready).await;
    assert_eq!(auto.replicas[0].device_mask, first());
    until(&m, &id("far"), PoolSnapshot::ready).await;
    m.preload(&id("asked")).await.unwrap();
    until(&m, &id("asked"), PoolSnapshot::ready).await;
    let (_, guard) = m.allocate_lease(&id("fixed")).unwrap();
    let began = Instant::now();
    node.gpus.say(&first(), Said::Xid(119));
    until(&m, &id("fixed"), PoolSnapshot::draining).await;
    let stands = device(&m, &first()).await;
    assert_eq!((stands.health.code(), stands.verdict), ("draining", Verdict::ResetDevice));
    // Whoever can be elsewhere is, and who was there because somebody asked waits to be asked again.
    let moved = until(&m, &id("auto"), |s| s.ready() && s.replicas[0].generation.0 == 2).await;
    assert_eq!(moved.replicas[0].device_mask, gpu(1, 0).uuid);
    until(&m, &id("asked"), |s| state(s) == "idle").await;
    // A lease has a short time.
    let waits = until(&m, &id("fixed"), |s| s.replicas[0].reason_code == "devices").await;
    assert!((Duration::from_secs(10)..Duration::from_secs(13)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(waits.replicas[0].reason.contains("XID 119"), "{waits:#?}");
    assert_eq!((waits.replicas[0].restart_count, waits.replicas[0].backoff_failures), (0, 0), "it did nothing wrong");
    drop(guard);
    assert_eq!(device(&m, &first()).await.health.code(), "fenced");
    untouched(&m, "far").await;

    // Nobody resets it but a person.
    tokio::time::sleep(Duration::from_secs(24 * 3_600)).await;
    assert_eq!(device(&m, &first()).await.health.code(), "fenced");
    let whole = gpu(0, 24 << 30);
    node.gpus.change(|i| i.devices.retain(|d| d.uuid != first()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    node.gpus.change(|i| i.devices.insert(0, whole.clone()));
    let back = Instant::now();
    until(&m, &id("fixed"), PoolSnapshot::ready).await;
    assert!((Duration::from_secs(60)..Duration::from_secs(66)).contains(&back.elapsed()), "{:?}", back.elapsed());
    assert_eq!(device(&m, &first()).await.health, DeviceHealth::Ok);
    let told: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).collect();
    assert!(told.contains(&"device_readmitted"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_person_may_say_that_it_was_reset() {
    let (node, m, _events) = serving().await;
    node.gpus.say(&first(), Said::DoubleBitEcc);
    until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
    m.unfence("0").await.unwrap();
    until(&m, &id("a"), PoolSnapshot::ready).await;
    until(&m, &id("b"), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn engines_of_a_lost_device_are_ended_at_once_whoever_uses_them() {
    let (node, m, _events) = serving().await;
    let (_, guard) = m.allocate_lease(&id("a")).unwrap();
    node.gpus.say(&first(), Said::Xid(79));
    shortly().await;
    let stands = device(&m, &first()).await;
    assert_eq!((stands.health.code(), stands.verdict), ("lost", Verdict::RebootNode));
    for name in ["a", "b"] {
        let ended = until(&m, &id(name), |s| !s.replicas[0].live).await;
        assert_eq!(ended.last_error().unwrap().class, FailureClass::GpuLost, "{ended:#?}");
    }
    drop(guard);
    untouched(&m, "far").await;
    until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
}

#[tokio::test(start_paused = true)]
async fn one_that_leaves_without_a_word_is_missed_within_six_seconds() {
    for listed in [true, false] {
        let (node, m, _events) = serving().await;
        let began = Instant::now();
        node.gpus.change(|i| {
            if listed {
                i.devices[0].health = DeviceHealth::Lost("the driver no longer lists it".into());
            } else {
                i.devices.remove(0);
            }
        });
        let ended = until(&m, &id("a"), |s| !s.replicas[0].live).await;
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
        assert_eq!(ended.last_error().unwrap().class, FailureClass::GpuLost);
        untouched(&m, "far").await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_missing_for_a_moment_or_unknown_for_long_costs_nobody_an_engine() {
    let (node, m, _events) = serving().await;
    let whole = gpu(0, 24 << 30);
    node.gpus.change(|i| i.devices.retain(|d| d.uuid != first()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    node.gpus.change(|i| i.devices.insert(0, whole.clone()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    // NVML hangs, or the driver is loaded anew.
    node.gpus.change(|i| {
        i.devices.iter_mut().for_each(|d| d.health = DeviceHealth::Unknown("silent".into()));
        i.problem = Some("silent".into());
    });
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    node.gpus.change(|i| i.devices.clear());
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    for name in ["a", "b", "far"] {
        untouched(&m, name).await;
    }
}

#[tokio::test(start_paused = true)]
async fn only_the_accused_slice_is_touched_unless_it_is_the_whole_gpu() {
    let node = FakeNode::default();
    let slice = |n: u32| DeviceSnapshot {
        uuid: format!("MIG-51000000-0000-4000-8000-{n:012}"),
        index: 0,
        mig: Some(MigSlice { parent: first(), profile: "1g.12gb".into(), index: n }),
        ..gpu(0, 11 << 30)
    };
    node.gpus.change(|i| {
        i.devices[0].mig_parent = true;
        i.devices.extend([slice(0), slice(1)]);
    });
    let (m, _events) = node.manage(vec![on("zero", "0:0"), on("one", "0:1")]).await;
    for name in ["zero", "one"] {
        until(&m, &id(name), PoolSnapshot::ready).await;
    }
    node.gpus.say(&slice(1).uuid, Said::Xid(31));
    until(&m, &id("one"), |s| s.ready() && s.replicas[0].generation.0 == 2).await;
    untouched(&m, "zero").await;
    node.gpus.say(&slice(1).uuid, Said::Xid(95));
    until(&m, &id("one"), |s| s.replicas[0].reason_code == "devices").await;
    untouched(&m, "zero").await;
    assert_eq!(device(&m, &slice(0).uuid).await.health, DeviceHealth::Ok);
    // Of the GPU itself it is of both.
    node.gpus.say(&first(), Said::Xid(95));
    until(&m, &id("zero"), |s| s.replicas[0].reason_code == "devices").await;
    // Taken apart under us, once it is well again.
    m.unfence("0").await.unwrap();
    m.unfence("0:1").await.unwrap();
    until(&m, &id("one"), PoolSnapshot::ready).await;
    until(&m, &id("zero"), PoolSnapshot::ready).await;
    node.gpus.change(|i| i.devices.retain(|d| d.uuid != slice(1).uuid));
    let ended = until(&m, &id("one"), |s| !s.replicas[0].live).await;
    assert_eq!(ended.last_error().unwrap().class, FailureClass::GpuLost);
    assert!(m.pool(&id("zero")).await.unwrap().ready());
}

#[tokio::test(start_paused = true)]
async fn rows_that_wait_for_a_reset_keep_new_starts_away_and_rows_that_failed_end_all() {
    let (node, m, _events) = serving().await;
    let rows = |pending, failed| {
        node.gpus.change(|i| i.devices[0].details.remap = Some(Remap { pending, failed }));
    };
    rows(true, false);
    shortly().await;
    let stands = device(&m, &first()).await;
    assert_eq!((stands.health.code(), stands.verdict), ("suspect", Verdict::ResetDevice));
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    untouched(&m, "a").await;
    rows(true, true);
    until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
    shortly().await;
    assert_eq!(device(&m, &first()).await.verdict, Verdict::Replace);
    untouched(&m, "far").await;
    // Another one is in its place.
    rows(false, false);
    until(&m, &id("a"), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn the_table_is_the_operators_and_can_be_switched_off() {
    let node = FakeNode::default();
    let table = XidTable { overrides: [(94, XidAction::Ignore), (43, XidAction::RestartEngine)].into() };
    let builder = node.builder(vec![on("a", "0").into()], Duration::ZERO).xids(Some(table));
    let (m, _events) = builder.start().await.unwrap();
    until(&m, &id("a"), PoolSnapshot::ready).await;
    node.gpus.say(&first(), Said::Xid(94));
    tokio::time::sleep(Duration::from_secs(60)).await;
    untouched(&m, "a").await;
    node.gpus.say(&first(), Said::Xid(43));
    until(&m, &id("a"), |s| s.ready() && s.replicas[0].generation.0 == 2).await;

    let node = FakeNode::default();
    let (m, _events) = node.builder(vec![on("a", "0").into()], Duration::ZERO).xids(None).start().await.unwrap();
    until(&m, &id("a"), PoolSnapshot::ready).await;
    for xid in [79, 119, 31] {
        node.gpus.say(&first(), Said::Xid(xid));
    }
    node.gpus.change(|i| i.devices[0].details.recovery_action = Some(2));
    tokio::time::sleep(Duration::from_secs(60)).await;
    untouched(&m, "a").await;
    assert_eq!(m.node().await.unwrap().xids.len(), 3, "they are counted");
}

#[tokio::test(start_paused = true)]
async fn who_stops_a_pool_while_its_device_is_drained_has_it_stay_down() {
    let (node, m, _events) = serving().await;
    let (_, guard) = m.allocate_lease(&id("a")).unwrap();
    node.gpus.say(&first(), Said::Xid(119));
    until(&m, &id("a"), PoolSnapshot::draining).await;
    m.stop(&id("a")).await.unwrap();
    until(&m, &id("a"), |s| state(s) == "idle").await;
    drop(guard);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let rests = m.pool(&id("a")).await.unwrap();
    assert_eq!((state(&rests), rests.hold), ("idle", true));
}

#[tokio::test(start_paused = true)]
async fn an_error_that_two_sources_tell_of_happened_once_and_of_one_alone_as_well() {
    use pool_domain::echo::Source;
    let (node, m, _events) = serving().await;
    for (first_source, then) in [(Source::KernelLog, Source::Driver), (Source::Driver, Source::KernelLog)] {
        node.gpus.say_by(&first(), Said::Xid(94), first_source);
        shortly().await;
        for name in ["a", "b"] {
            until(&m, &id(name), PoolSnapshot::ready).await;
        }
        node.gpus.say_by(&first(), Said::Xid(94), then);
        tokio::time::sleep(Duration::from_secs(40)).await;
    }
    // The kernel's log alone.
    node.gpus.say_by(&gpu(1, 0).uuid, Said::Xid(31), Source::KernelLog);
    until(&m, &id("far"), |s| s.ready() && s.replicas[0].generation.0 == 2).await;
    let counted: Vec<_> = m.node().await.unwrap().xids.iter().map(|x| (x.xid, x.count)).collect();
    assert_eq!(counted, [(94, 2), (31, 1)]);
    assert_eq!(m.pool(&id("a")).await.unwrap().replicas[0].generation.0, 3);
}

#[tokio::test(start_paused = true)]
async fn health_that_only_a_look_shows_is_told_once_each_time_it_changes() {
    let (node, m, mut events) = serving().await;
    let told = |events: &mut mpsc::Receiver<Event>| -> Vec<(String, &'static str, String, Verdict)> {
        let all = std::iter::from_fn(|| events.try_recv().ok());
        all.filter_map(|e| match e.kind {
            EventKind::DeviceHealthChanged { device, health, reason, verdict } => {
                Some((device, health, reason, verdict))
            }
            _ => None,
        })
        .collect()
    };
    assert_eq!(told(&mut events), [], "all are well");
    let unsure = DeviceHealth::Unknown("has not answered".into());
    let lost = DeviceHealth::Lost("off the bus".into());
    for (health, action, expected) in [
        (DeviceHealth::Ok, Some(77), ("suspect", "recovery (action 77)", Verdict::ResetDevice)),
        (unsure, None, ("unknown", "has not answered", Verdict::None)),
        (lost, None, ("lost", "off the bus", Verdict::None)),
        (DeviceHealth::Ok, None, ("ok", "", Verdict::None)),
    ] {
        node.gpus.change(|i| {
            i.devices[0].health = health.clone();
            i.devices[0].details.recovery_action = action;
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        let now = told(&mut events);
        assert_eq!(now.len(), 1, "{now:?}");
        let (device, code, reason, verdict) = &now[0];
        assert_eq!((device.as_str(), *code, *verdict), (&*first(), expected.0, expected.2));
        assert!(reason.contains(expected.1), "{reason}");
    }
    untouched(&m, "far").await;
}

#[tokio::test(start_paused = true)]
async fn a_device_that_its_driver_says_has_to_be_reset_is_drained() {
    let (node, m, _events) = serving().await;
    node.gpus.change(|i| i.devices[0].health = DeviceHealth::Fenced("the driver says: reset".into()));
    for name in ["a", "b"] {
        until(&m, &id(name), |s| !s.ready() && s.replicas[0].reason_code == "devices").await;
    }
    untouched(&m, "far").await;
    node.gpus.change(|i| i.devices[0].health = DeviceHealth::Ok);
    until(&m, &id("a"), |s| s.ready() && s.replicas[0].generation.0 > 1).await;
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_a_device_that_no_pool_uses_is_told_as_well() {
    let node = FakeNode::default();
    let (m, mut events) = node.manage(vec![on("far", "1")]).await;
    until(&m, &id("far"), PoolSnapshot::ready).await;
    node.gpus.say(&first(), Said::Xid(119));
    shortly().await;
    let stands = device(&m, &first()).await;
    assert_eq!((stands.health.code(), stands.verdict), ("fenced", Verdict::ResetDevice));
    m.unfence("0").await.unwrap();
    let of_node: Vec<Event> =
        std::iter::from_fn(|| events.try_recv().ok()).filter(|event| event.key.is_none()).collect();
    let told: Vec<(&str, String)> = of_node.iter().map(|e| (e.code(), e.human())).collect();
    let incident = "The driver reports XID 119 of a GPU that no pool uses: it is drained";
    let fenced = "A GPU is fenced; reset it (nvidia-smi --gpu-reset), or reboot the node";
    let again = "A GPU that was not well is used again";
    let expected = [
        ("device_incident", incident),
        ("device_health_changed", fenced),
        ("device_readmitted", again),
        ("device_health_changed", "A GPU is well again"),
    ];
    assert_eq!(told, expected.map(|(code, sentence)| (code, sentence.to_owned())));
    untouched(&m, "far").await;
}

#[tokio::test(start_paused = true)]
async fn what_the_driver_said_and_a_probation_outlive_the_daemon() {
    let (node, m, _events) = serving().await;
    node.gpus.say(&first(), Said::Xid(119));
    until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
    let whole = node.gpus.inventory().borrow().clone();
    // The next one finds the driver before its devices: none of them has been away.
    let again = async |m: PoolManager| {
        shortly().await;
        drop(m);
        node.gpus.forget_incidents();
        node.gpus.change(|i| (i.problem, i.devices) = (Some("the driver library is being opened".into()), Vec::new()));
        let (m, _) = node.manage(vec![on("a", "0"), on("far", "1")]).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        node.gpus.change(|i| *i = whole.clone());
        shortly().await;
        m
    };
    let m = again(m).await;
    let stands = device(&m, &first()).await;
    assert_eq!((stands.health.code(), stands.verdict), ("fenced", Verdict::ResetDevice));
    assert!(stands.health.reason().contains("XID 119"), "{stands:?}");
    let waits = until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
    assert!(waits.replicas[0].reason.contains("XID 119"), "{waits:#?}");
    // Somebody resets it, and it is watched for a minute; a restart makes that neither shorter nor longer.
    node.gpus.change(|i| i.devices.retain(|d| d.uuid != first()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    node.gpus.change(|i| *i = whole.clone());
    let back = Instant::now();
    tokio::time::sleep(Duration::from_secs(30)).await;
    let m = again(m).await;
    let watched = device(&m, &first()).await;
    assert!(watched.health.reason().contains("on probation"), "{watched:?}");
    until(&m, &id("a"), PoolSnapshot::ready).await;
    assert!((Duration::from_secs(60)..Duration::from_secs(63)).contains(&back.elapsed()), "{:?}", back.elapsed());
    // A reboot resets every device.
    node.gpus.say(&first(), Said::Xid(119));
    until(&m, &id("a"), |s| s.replicas[0].reason_code == "devices").await;
    shortly().await;
    drop(m);
    node.ledger.forget_devices();
    node.gpus.forget_incidents();
    let (m, _events) = node.manage(vec![on("a", "0")]).await;
    until(&m, &id("a"), PoolSnapshot::ready).await;
}
