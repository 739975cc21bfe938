//! On the stand-in library, through the real FFI. Each test needs a process of its own, as nextest gives it: the library
//! is loaded once a process.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gpu_nvml::{NvmlError, NvmlGpus, Opening, Options};
use nvml_standin::script::{Block, EVERY_CALL, Event, Size, Slice};
use nvml_standin::{Installed, Script};
use pool_domain::charges::Said;
use pool_domain::device::{Ecc, Remap};
use pool_domain::echo::Source;
use pool_domain::{DeviceHealth, DeviceSnapshot, Verdict};
use pool_services::ports::{GpuProbe, Holder, Incident, Inventory, Reach, Residency};

/// Longest any wait may take; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);

fn gpu(n: u32) -> String {
    format!("GPU-51000000-0000-4000-8000-{n:012x}")
}

fn slice(n: u32) -> String {
    format!("MIG-51000000-0000-4000-8000-{:012x}", 0xa0 + n)
}

struct Site {
    library: Installed,
    script: Script,
    dir: tempfile::TempDir,
}

impl Site {
    fn of(name: &str) -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nvml-standin/topologies").join(name);
        let script = Script::parse(&fs::read_to_string(file).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        Self { library: Installed::into_dir(dir.path(), &script).unwrap(), script, dir }
    }

    fn change(&mut self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script);
        self.library.play(&self.script).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self) -> NvmlGpus {
        self.start_beside(None)
    }

    /// With this for the kernel's log.
    fn start_beside(&self, kernel_log: Option<PathBuf>) -> NvmlGpus {
        NvmlGpus::start(Options {
            kernel_log,
            library: Some(self.library.library()),
            sample_every: Duration::from_millis(10),
            answer_within: Duration::from_millis(300),
            open_within: Duration::from_secs(60),
            open_again: (Duration::from_millis(10), Duration::from_millis(40)),
        })
        .unwrap()
    }
}

async fn until(gpus: &NvmlGpus, wanted: impl Fn(&Inventory) -> bool) -> Inventory {
    let mut seen = gpus.inventory();
    let found = tokio::time::timeout(PATIENCE, seen.wait_for(|i| wanted(i))).await;
    match found {
        Ok(found) => found.unwrap().clone(),
        Err(_) => panic!("never came: {:#?}", gpus.inventory().borrow()),
    }
}

async fn opening(gpus: &NvmlGpus, wanted: impl Fn(&Opening) -> bool) -> Opening {
    let mut seen = gpus.opening();
    tokio::time::timeout(PATIENCE, seen.wait_for(|o| wanted(o))).await.unwrap().unwrap().clone()
}

fn well(i: &Inventory) -> bool {
    i.problem.is_none() && !i.devices.is_empty() && i.devices.iter().all(|d| d.health == DeviceHealth::Ok)
}

fn find<'a>(i: &'a Inventory, uuid: &str) -> &'a DeviceSnapshot {
    i.devices.iter().find(|d| d.uuid == uuid).unwrap()
}

fn code(i: &Inventory, uuid: &str) -> &'static str {
    i.devices.iter().find(|d| d.uuid == uuid).map_or("absent", |d| d.health.code())
}

#[tokio::test]
async fn everything_that_the_driver_tells_is_read() {
    let mut site = Site::of("eight-nvlink.toml");
    site.change(|s| {
        let first = s.gpu(&gpu(1));
        first.ecc = Some((7, 2));
        first.remap_pending = Some(true);
        first.clock_limits = Some(0x4 | 0x40);
        first.utilisation = Some(80);
    });
    let gpus = site.start();
    let i = until(&gpus, |i| i.devices.len() == 8).await;
    assert_eq!((i.driver.as_deref(), i.cuda.as_deref()), (Some(nvml_standin::DRIVER_VERSION), Some("13.0")));
    assert!(!i.simulated);
    let d = find(&i, &gpu(1));
    assert_eq!((d.name.as_str(), d.index), ("STAND-IN NVIDIA H100 80GB HBM3", 0));
    assert_eq!((d.pci_bus_id.as_deref(), d.compute_capability), (Some("0000:1b:00.0"), Some((9, 0))));
    assert_eq!((d.vram_total, d.vram_reserved, d.vram_used), (80 << 30, 600 << 20, 0));
    assert_eq!(d.vram_free, (80 << 30) - (600 << 20));
    assert_eq!((d.numa_node, d.utilisation), (Some(0), Some(80)));
    let t = &d.details;
    assert_eq!(t.ecc, Some(Ecc { corrected: 7, uncorrected: 2 }));
    assert_eq!((t.remap, t.recovery_action), (Some(Remap { pending: true, failed: false }), Some(0)));
    assert_eq!((t.persistence, t.temperature), (Some(true), Some(34)));
    assert_eq!((t.power, t.power_limit, t.energy), (Some(68_000), Some(700_000), Some(1_000_000)));
    assert_eq!((t.sm_clock, t.memory_clock, t.memory_utilisation), (Some(345), Some(2_619), Some(40)));
    assert_eq!(t.clock_limits, Some(vec!["power_cap".to_owned(), "hardware_thermal".to_owned()]));
    // Not exported by the stand-in, as by an old driver.
    assert_eq!(t.pcie_replays, None);
    assert_eq!(t.peers.len(), 7);
    let near = t.peers.iter().find(|p| p.uuid == gpu(2)).unwrap();
    assert_eq!((near.path.as_deref(), near.p2p, near.nvlinks), (Some("numa_node"), Some(true), 1));
    let far = t.peers.iter().find(|p| p.uuid == gpu(8)).unwrap();
    assert_eq!((far.path.as_deref(), far.p2p, far.nvlinks), (Some("system"), Some(true), 1));
}

#[tokio::test]
async fn cards_stand_in_the_order_of_the_bus_and_what_they_do_not_tell_is_no_fault() {
    let site = Site::of("mixed-24-12.toml");
    assert_eq!(site.script.device[0].uuid, gpu(2), "NVML counts them in another order");
    let gpus = site.start();
    let i = until(&gpus, |i| i.devices.len() == 2).await;
    let order: Vec<_> = i.devices.iter().map(|d| (d.index, d.uuid.clone())).collect();
    assert_eq!(order, [(0, gpu(1)), (1, gpu(2))]);
    let t = &i.devices[0].details;
    assert_eq!((t.ecc, t.remap, t.recovery_action, i.devices[0].numa_node), (None, None, None, None));
    assert!(well(&i), "{i:#?}");
}

#[tokio::test]
async fn slices_are_found_by_uuid_though_their_handles_are_used_again() {
    let mut site = Site::of("h100-seven-slices.toml");
    let gpus = site.start();
    let i = until(&gpus, |i| i.devices.len() == 8).await;
    let third = find(&i, &slice(2));
    assert_eq!((third.vram_total, third.details.instance), (11 << 30, Some((9, 0))));
    let mig = third.mig.as_ref().unwrap();
    assert_eq!((mig.profile.as_str(), mig.index, mig.parent.as_str()), ("1g.12gb", 2, gpu(1).as_str()));
    assert!(find(&i, &gpu(1)).mig_parent);
    // Taken apart under us: another slice has the place, and so the handle, of the first, and there are holes.
    site.change(|s| {
        let new = |n, profile: &str, vram, place| Slice {
            uuid: slice(n),
            profile: profile.into(),
            vram: Size::gib(vram),
            place,
            gi: place,
            ci: 0,
        };
        s.gpu(&gpu(1)).mig = vec![new(9, "3g.47gb", 46, 0), new(10, "1g.12gb", 11, 5)];
    });
    let i = until(&gpus, |i| i.devices.len() == 3).await;
    assert_eq!((code(&i, &slice(0)), code(&i, &slice(9)), code(&i, &slice(10))), ("absent", "ok", "ok"));
    assert_eq!(find(&i, &slice(9)).vram_total, 46 << 30);
}

#[tokio::test]
async fn every_failure_to_open_has_its_own_reason() {
    let mut site = Site::of("mixed-24-12.toml");
    let errors = |s: &mut Script, call: &str, code: u32| s.errors = [(call.to_owned(), code)].into();
    site.change(|s| errors(s, "nvmlInit_v2", 9));
    let gpus = site.start();
    for (call, code, expected) in [
        ("nvmlInit_v2", 9, NvmlError::DriverNotLoaded),
        ("nvmlInit_v2", 4, NvmlError::NoPermission),
        ("nvmlInit_v2", 18, NvmlError::VersionMismatch),
        ("nvmlInit_v2", 999, NvmlError::Other("an internal driver error occurred".into())),
        ("nvmlDeviceGetHandleByIndex_v2", 4, NvmlError::NoPermission),
        ("nvmlDeviceGetCount_v2", 9, NvmlError::DriverNotLoaded),
    ] {
        site.change(|s| errors(s, call, code));
        opening(&gpus, |o| *o == Opening::Trying(Some(expected.clone()))).await;
        let i = until(&gpus, |i| i.problem.as_deref() == Some(&expected.to_string())).await;
        assert!(i.devices.is_empty());
        assert!(matches!(gpus.residency().await, Residency::Unknown(_)));
    }
    site.change(|s| {
        s.errors.clear();
        s.device.iter_mut().for_each(|d| d.gone = true);
    });
    opening(&gpus, |o| *o == Opening::Trying(Some(NvmlError::NoDevice))).await;
    site.change(|s| s.device.iter_mut().for_each(|d| d.gone = false));
    opening(&gpus, |o| *o == Opening::Done).await;
    until(&gpus, well).await;

    let none = NvmlGpus::start(Options { library: Some(site.file("none.so")), ..Options::default() }).unwrap();
    let missing = opening(&none, |o| matches!(o, Opening::Trying(Some(_)))).await;
    assert!(matches!(missing, Opening::Trying(Some(e @ NvmlError::LibraryMissing(_))) if e.is_hopeless()));
    for (name, content) in
        [("short.so", ""), ("text.so", "#!/bin/sh, and enough of it to be taken for a header of a library")]
    {
        fs::write(site.file(name), content.repeat(20)).unwrap();
        let broken = NvmlGpus::start(Options { library: Some(site.file(name)), ..Options::default() }).unwrap();
        let told = opening(&broken, |o| matches!(o, Opening::Trying(Some(_)))).await;
        assert!(
            matches!(&told, Opening::Trying(Some(e @ NvmlError::LibraryBroken(_))) if e.is_hopeless()),
            "{name}: {told:?}"
        );
    }
}

#[tokio::test]
async fn a_gpu_that_fails_from_the_first_is_told_of_and_no_other_gets_its_number() {
    let mut site = Site::of("eight-nvlink.toml");
    for (error, health, words) in [(15, "lost", "fell off"), (16, "fenced", "reset"), (999, "unknown", "internal")] {
        site.change(|s| s.gpu(&gpu(2)).errors = [(EVERY_CALL.to_owned(), error)].into());
        let gpus = site.start();
        let i = until(&gpus, |i| i.devices.len() == 8).await;
        assert_eq!((find(&i, &gpu(1)).index, find(&i, &gpu(3)).index), (0, 2), "{i:#?}");
        let silent = &i.devices[1];
        assert_eq!((silent.uuid.as_str(), silent.health.code()), ("GPU-unknown-1", health), "{i:#?}");
        let problem = i.problem.unwrap();
        assert!(problem.contains("1 of the GPUs") && problem.contains(words), "{problem}");
        site.change(|s| s.gpu(&gpu(2)).errors.clear());
        let i = until(&gpus, well).await;
        assert_eq!((i.devices.len(), find(&i, &gpu(2)).index), (8, 1));
    }
}

#[tokio::test]
async fn when_no_gpu_can_be_used_it_is_said_why_and_never_taken_for_a_permission() {
    let mut site = Site::of("mixed-24-12.toml");
    for (error, words) in [(15, "fell off"), (16, "reset"), (23, "23"), (999, "internal")] {
        site.change(|s| s.device.iter_mut().for_each(|d| d.errors = [(EVERY_CALL.to_owned(), error)].into()));
        let gpus = site.start();
        match opening(&gpus, |o| matches!(o, Opening::Trying(Some(_)))).await {
            Opening::Trying(Some(NvmlError::Unusable { count: 2, why })) => assert!(why.contains(words), "{why}"),
            other => panic!("{error}: {other:?}"),
        }
        site.change(|s| s.device.iter_mut().for_each(|d| d.errors.clear()));
        opening(&gpus, |o| *o == Opening::Done).await;
        until(&gpus, well).await;
    }
}

#[tokio::test]
async fn a_call_that_hangs_makes_its_device_unknown_and_all_others_old_until_it_returns() {
    let mut site = Site::of("eight-nvlink.toml");
    let gpus = site.start();
    until(&gpus, well).await;
    let hung = site.file("hung");
    fs::write(&hung, "").unwrap();
    let block = Block { call: EVERY_CALL.into(), device: Some(gpu(3)), while_file: hung.clone() };
    site.change(|s| s.block.push(block));
    let i = until(&gpus, |i| i.problem.is_some()).await;
    assert!(i.problem.as_deref().unwrap().contains("about GPU 2"), "{:?}", i.problem);
    assert!(i.devices.iter().all(|d| d.health.code() == "unknown" && d.vram_free == 0), "{i:#?}");
    assert!(find(&i, &gpu(3)).health.reason().contains("has not answered"), "{i:#?}");
    assert!(find(&i, &gpu(1)).health.reason().contains("is old"), "{i:#?}");
    assert!(matches!(gpus.residency().await, Residency::Unknown(why) if why.contains("has not answered")));
    // Of what changes nothing is told.
    assert_eq!((find(&i, &gpu(3)).vram_total, find(&i, &gpu(3)).details.power), (80 << 30, None));
    assert_eq!(fs::read_to_string(&hung).unwrap().lines().count(), 1, "one call hangs, and no second is made");
    fs::remove_file(&hung).unwrap();
    until(&gpus, well).await;
    assert!(matches!(gpus.residency().await, Residency::Provable(_) | Residency::Partial(_)));
}

#[tokio::test]
async fn a_library_that_hangs_while_it_is_opened_is_used_once_it_returns() {
    let mut site = Site::of("mixed-24-12.toml");
    let hung = site.file("hung");
    fs::write(&hung, "").unwrap();
    site.change(|s| s.block.push(Block { call: "nvmlInit_v2".into(), device: None, while_file: hung.clone() }));
    let gpus = NvmlGpus::start(Options {
        library: Some(site.library.library()),
        open_within: Duration::from_millis(50),
        ..Options::default()
    })
    .unwrap();
    let i = until(&gpus, |i| i.problem.as_deref().is_some_and(|p| p.contains("has not answered"))).await;
    assert!(i.devices.is_empty());
    fs::remove_file(&hung).unwrap();
    until(&gpus, well).await;
}

#[tokio::test]
async fn a_driver_that_is_loaded_anew_is_found_and_its_events_are_heard() {
    let mut site = Site::of("mixed-24-12.toml");
    let gpus = site.start();
    until(&gpus, well).await;
    for (number, (code, words)) in [(9, "not loaded"), (18, "different versions")].into_iter().enumerate() {
        site.change(|s| {
            s.errors.insert(EVERY_CALL.into(), code);
        });
        let i = until(&gpus, |i| i.problem.as_deref().is_some_and(|p| p.contains(words))).await;
        assert!(i.devices.iter().all(|d| d.health.code() == "unknown"), "{i:#?}");
        assert_eq!(i.devices.len(), 2, "they are there, as far as anybody knows");
        site.change(|s| s.errors.clear());
        until(&gpus, well).await;
        say_until_heard(&mut site, &gpus, 63 + number as u64).await;
    }
}

/// Has the driver report an XID of the first GPU until it is heard: what it reports before somebody listens is lost, as
/// with the real one.
async fn say_until_heard(site: &mut Site, gpus: &NvmlGpus, xid: u64) {
    let mut heard = gpus.incidents();
    while !heard.borrow_and_update().newest.iter().any(|i| i.said == Said::Xid(xid)) {
        let id = site.script.event.iter().map(|e| e.id).max().unwrap_or(0) + 1;
        site.change(|s| s.event.push(Event { id, device: gpu(1), data: xid, ..Event::default() }));
        let _ = tokio::time::timeout(Duration::from_millis(500), heard.changed()).await;
    }
}

#[tokio::test]
async fn no_device_is_published_before_its_events_are_heard() {
    let mut site = Site::of("mixed-24-12.toml");
    let hung = site.file("hung");
    fs::write(&hung, "").unwrap();
    let call = "nvmlDeviceRegisterEvents".to_owned();
    site.change(|s| s.block.push(Block { call, device: Some(gpu(1)), while_file: hung.clone() }));
    let gpus = site.start();
    // It is inside that call.
    while fs::read_to_string(&hung).unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(*gpus.opening().borrow(), Opening::Trying(None));
    assert!(gpus.inventory().borrow().devices.is_empty());
    fs::remove_file(&hung).unwrap();
    opening(&gpus, |o| *o == Opening::Done).await;
    until(&gpus, well).await;
}

#[tokio::test]
async fn events_that_could_not_be_asked_for_are_asked_for_again_and_it_is_said_meanwhile() {
    let mut site = Site::of("mixed-24-12.toml");
    site.change(|s| s.gpu(&gpu(1)).errors = [("nvmlDeviceRegisterEvents".to_owned(), 999)].into());
    let gpus = site.start();
    let i = until(&gpus, |i| i.devices.len() == 2).await;
    assert!(find(&i, &gpu(1)).details.unheard.as_deref().unwrap().contains("internal"), "{i:#?}");
    assert_eq!((find(&i, &gpu(2)).details.unheard.as_ref(), well(&i)), (None, true), "it is used all the same");
    site.change(|s| s.gpu(&gpu(1)).errors.clear());
    until(&gpus, |i| find(i, &gpu(1)).details.unheard.is_none()).await;
    say_until_heard(&mut site, &gpus, 94).await;
}

#[tokio::test]
async fn a_gpu_that_leaves_without_a_word_is_lost_and_one_that_comes_back_is_not() {
    let mut site = Site::of("eight-nvlink.toml");
    let gpus = site.start();
    until(&gpus, well).await;
    site.change(|s| s.gpu(&gpu(4)).gone = true);
    let i = until(&gpus, |i| code(i, &gpu(4)) == "lost").await;
    assert_eq!(i.devices.iter().filter(|d| d.health.admits()).count(), 7, "{i:#?}");
    assert_eq!(find(&i, &gpu(4)).verdict, Verdict::RebootNode);
    site.change(|s| s.gpu(&gpu(4)).gone = false);
    until(&gpus, well).await;
}

#[tokio::test]
async fn an_error_of_one_device_is_no_other_s() {
    let mut site = Site::of("eight-nvlink.toml");
    let gpus = site.start();
    until(&gpus, well).await;
    for (call, error, expected, verdict) in [
        ("nvmlDeviceGetMemoryInfo_v2", 15, "lost", Verdict::RebootNode),
        ("nvmlDeviceGetMemoryInfo_v2", 16, "fenced", Verdict::ResetDevice),
        ("nvmlDeviceGetMemoryInfo_v2", 999, "unknown", Verdict::None),
        ("nvmlDeviceGetMemoryInfo_v2", 3, "unknown", Verdict::None),
        ("nvmlDeviceGetMemoryInfo_v2", 15, "lost", Verdict::RebootNode),
        (EVERY_CALL, 15, "lost", Verdict::RebootNode),
        (EVERY_CALL, 999, "unknown", Verdict::None),
    ] {
        site.change(|s| s.gpu(&gpu(2)).errors = [(call.to_owned(), error)].into());
        let i = until(&gpus, |i| code(i, &gpu(2)) == expected).await;
        assert_eq!(find(&i, &gpu(2)).verdict, verdict, "{call} {error}");
        assert_eq!(i.devices.iter().filter(|d| d.health.admits()).count(), 7, "{call} {error}");
        assert!(
            !matches!(gpus.residency().await, Residency::Unknown(_)),
            "of the others it can be said: {call} {error}"
        );
        site.change(|s| s.gpu(&gpu(2)).errors.clear());
        until(&gpus, well).await;
    }
}

#[tokio::test]
async fn errors_are_told_of_the_gpu_or_the_slice_that_they_are_of() {
    let mut site = Site::of("h100-seven-slices.toml");
    let gpus = site.start();
    until(&gpus, |i| i.devices.len() == 8).await;
    say_until_heard(&mut site, &gpus, 63).await;
    let event = |id, data, instance| Event { id, device: gpu(1), data, instance, ..Event::default() };
    site.change(|s| {
        s.event = vec![
            event(1_002, 94, Some((9, 0))),
            event(1_003, 79, None),
            event(1_004, 13, Some((77, 0))),
            Event { kind: Some(0x100), ..event(1_005, 0, None) },
            Event { kind: Some(2), ..event(1_006, 0, None) },
        ];
    });
    let mut heard = gpus.incidents();
    let last = |i: &Incident| i.said == Said::DoubleBitEcc;
    tokio::time::timeout(PATIENCE, heard.wait_for(|i| i.newest.iter().any(last))).await.unwrap().unwrap();
    let told: Vec<_> = heard.borrow().newest.iter().map(|i| (i.device.clone(), i.said, i.reach)).collect();
    let told: Vec<_> = told.into_iter().filter(|(_, said, _)| *said != Said::Xid(63)).collect();
    let expected = [
        (slice(2), Said::Xid(94), Reach::Device),
        (gpu(1), Said::Xid(79), Reach::Device),
        // Of a slice that nobody knows: the GPU, but not all of it.
        (gpu(1), Said::Xid(13), Reach::UnknownSlice),
        (gpu(1), Said::DoubleBitEcc, Reach::Device),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn who_holds_memory_is_told_slice_by_slice_and_what_comes_back_late_is_nobody_s() {
    let mut site = Site::of("h100-seven-slices.toml");
    let (pid, claims) = (std::process::id(), site.library.claims());
    let claim = sim_claims::Claim::hold(&claims, &[(&slice(3), 2 << 30)]).unwrap();
    let gpus = site.start();
    let i = until(&gpus, |i| i.devices.len() == 8).await;
    assert_eq!((find(&i, &slice(3)).vram_used, find(&i, &gpu(1)).vram_used), (2 << 30, 2 << 30));
    let process = &find(&i, &slice(3)).details.processes[0];
    assert_eq!((process.pid, process.bytes), (pid, 2 << 30));
    let holder = Holder { uuid: slice(3), pid, bytes: 2 << 30 };
    match gpus.residency().await {
        Residency::Provable(all) => {
            assert_eq!(all, [holder]);
            assert!(process.name.is_some(), "{process:?}");
        }
        Residency::Partial(all) => assert_eq!(all, [holder]),
        other => panic!("{other:?}"),
    }
    site.change(|s| s.free_after_ms = 1_000_000);
    // Known before the claim ends.
    assert!(!matches!(gpus.residency().await, Residency::Unknown(_)));
    drop(claim);
    let empty = |r: &Residency| matches!(r, Residency::Provable(all) | Residency::Partial(all) if all.is_empty());
    while !empty(&gpus.residency().await) {}
    assert_eq!(find(&gpus.inventory().borrow(), &slice(3)).vram_used, 2 << 30);
    site.change(|s| s.free_after_ms = 0);
    until(&gpus, |i| find(i, &slice(3)).vram_used == 0).await;
}

#[tokio::test]
async fn it_ends_when_nobody_wants_it_any_more() {
    let site = Site::of("mixed-24-12.toml");
    let gpus = site.start();
    until(&gpus, well).await;
    let mut seen = gpus.inventory();
    drop(gpus);
    // The last senders are the threads'.
    tokio::time::timeout(PATIENCE, seen.wait_for(|_| false)).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn the_kernel_s_log_tells_of_errors_too_from_its_end_on() {
    let site = Site::of("h100-seven-slices.toml");
    let (file, pipe) = (site.file("kmsg"), site.file("pipe"));
    fs::write(&file, "4,1,1,-;NVRM: Xid (PCI:0000:41:00): 79, before anybody listened\n").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for log in [file, pipe] {
        let gpus = site.start_beside(Some(log.clone()));
        until(&gpus, well).await;
        let mut kernel = fs::OpenOptions::new().append(true).open(&log).unwrap();
        let mut says = |text: &str| std::io::Write::write_all(&mut kernel, text.as_bytes()).unwrap();
        says("6,2,2,-;NVRM: loading NVIDIA UNIX Open Kernel Module\n");
        says("4,3,3,-;NVRM: Xid (PCI:0000:99:00): 79, of a GPU that nobody knows\n");
        says("4,4,4,-;NVRM: Xid (PCI:0000:41:00 GPU-I:09): 94, pid=7194, name=a, Cont");
        // In two pieces, as a pipe may bring it.
        says("ained\n4,5,5,-;NVRM: Xid (PCI:0000:41:00): 119, pid=77, name=b, Timeout waiting for RPC from GSP0!\n");
        let mut heard = gpus.incidents();
        let last = |i: &Incident| i.said == Said::Xid(119);
        tokio::time::timeout(PATIENCE, heard.wait_for(|i| i.newest.iter().any(last))).await.unwrap().unwrap();
        let (reach, source) = (Reach::Device, Source::KernelLog);
        let incident = |device, xid, pid| Incident { device, reach, said: Said::Xid(xid), pid, source };
        let told: Vec<_> = heard.borrow().newest.iter().cloned().collect();
        assert_eq!(told, [incident(slice(2), 94, Some(7_194)), incident(gpu(1), 119, Some(77))]);
    }
}

#[tokio::test]
async fn a_log_that_may_not_be_read_is_no_obstacle() {
    let site = Site::of("mixed-24-12.toml");
    let gpus = site.start_beside(Some(site.file("nothing")));
    until(&gpus, well).await;
}
