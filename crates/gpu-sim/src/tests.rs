use bytesize::ByteSize;
use pool_domain::device::MigSlice;
use pool_domain::{DeviceHealth, DeviceMask};
use sim_claims::Claim;

use super::*;

const A: &str = "GPU-51000000-0000-4000-8000-000000000001";
const B: &str = "GPU-51000000-0000-4000-8000-000000000002";
const S0: &str = "MIG-51000000-0000-4000-8000-0000000000a0";
const S1: &str = "MIG-51000000-0000-4000-8000-0000000000a1";
const GIB: u64 = 1 << 30;

fn sliced() -> String {
    format!(
        r#"
[[device]]
name = "Simulated H100"
uuid = "{A}"
vram = "94 GiB"
compute_capability = "9.0"
numa_node = 1
foreign_used = "2 GiB"
mig = [{{ profile = "1g.12gb", uuid = "{S0}" }}, {{ profile = "2g.24gb+me", uuid = "{S1}", vram = "20GiB" }}]
"#
    )
}

fn gpus(text: &str, dir: &tempfile::TempDir) -> SimulatedGpus {
    SimulatedGpus::from_toml(text, dir.path().to_owned()).unwrap()
}

#[test]
fn the_built_in_topology() {
    let dir = tempfile::tempdir().unwrap();
    let gpus = SimulatedGpus::two_gpus(dir.path().join("sim")).unwrap();
    assert_eq!(gpus.sim_dir(), dir.path().join("sim"));
    let now = gpus.inventory().borrow().clone();
    assert!(now.simulated);
    assert_eq!(now.problem, None);
    assert_eq!(now.devices.iter().map(|d| d.vram_total).collect::<Vec<_>>(), [24 * GIB, 12 * GIB]);
    assert_eq!(now.devices.iter().map(|d| d.uuid.as_str()).collect::<Vec<_>>(), [A, B]);
    assert_eq!(now.devices[0].compute_capability, Some((8, 9)));
    assert_eq!(now.devices[1].index, 1);
    assert!(now.devices.iter().all(|d| d.health == DeviceHealth::Ok && d.name.starts_with("Simulated")));
}

#[test]
fn slices_are_devices_and_their_gpu_is_not_used_whole() {
    let dir = tempfile::tempdir().unwrap();
    let gpus = gpus(&sliced(), &dir);
    let now = gpus.inventory().borrow().clone();
    let [parent, s0, s1] = now.devices.as_slice() else { panic!("three devices: {now:?}") };
    assert!(parent.mig_parent && parent.mig.is_none());
    assert_eq!((parent.numa_node, parent.vram_foreign, parent.vram_free), (Some(1), 2 * GIB, 92 * GIB));
    assert_eq!(s0.mig, Some(MigSlice { parent: A.into(), profile: "1g.12gb".into(), index: 0 }));
    assert_eq!((s0.vram_total, s1.vram_total), (12 * GIB, 20 * GIB));
    assert_eq!((s0.vram_foreign, s0.vram_used, s0.index), (0, 0, 0));
    let mask = DeviceMask::parse("0:1").unwrap().validate_against_discovered(&now.devices).unwrap();
    assert_eq!(mask.uuids, [S1]);
}

#[tokio::test]
async fn claims_use_memory_until_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let gpus = gpus(&sliced(), &dir);
    let mut seen = gpus.inventory();
    let claim = Claim::hold(dir.path(), &[(S0, 3 * GIB), (S1, GIB), ("GPU-elsewhere", 1)]).unwrap();
    gpus.refresh();
    assert!(seen.has_changed().unwrap());
    let now = seen.borrow_and_update().clone();
    let used = |now: &Inventory| now.devices.iter().map(|d| d.vram_used / GIB).collect::<Vec<_>>();
    assert_eq!(used(&now), [6, 3, 1]);
    assert!(now.devices.iter().all(|d| d.vram_free + d.vram_used == d.vram_total));
    let pid = std::process::id();
    let holder = |uuid: &str, bytes| Holder { uuid: uuid.into(), pid, bytes };
    assert_eq!(gpus.residency().await, Residency::Simulated(vec![holder(S0, 3 * GIB), holder(S1, GIB)]));
    gpus.refresh();
    assert!(!seen.has_changed().unwrap(), "nothing new, nobody told");
    drop(claim);
    gpus.refresh();
    assert_eq!(used(&seen.borrow_and_update()), [2, 0, 0]);
    assert_eq!(gpus.residency().await, Residency::Simulated(Vec::new()));
}

#[test]
fn more_claims_than_memory_leave_none_free() {
    let dir = tempfile::tempdir().unwrap();
    let gpus = gpus(TWO_GPUS, &dir);
    let _claims = Claim::hold(dir.path(), &[(A, u64::MAX), (A, u64::MAX)]).unwrap();
    gpus.refresh();
    let now = gpus.inventory().borrow().clone();
    assert_eq!((now.devices[0].vram_free, now.devices[0].vram_used), (0, 24 * GIB));
    assert_eq!(now.devices[1].vram_used, 0);
}

#[tokio::test]
async fn unreadable_claims_are_a_problem_and_nobody_can_say() {
    let dir = tempfile::tempdir().unwrap();
    let gpus = gpus(TWO_GPUS, &dir);
    let claim = Claim::hold(dir.path(), &[(A, GIB)]).unwrap();
    gpus.refresh();
    let path = dir.path().join("claim-1-0");
    std::fs::write(&path, "nonsense").unwrap();
    let broken = std::fs::File::open(&path).unwrap();
    broken.lock().unwrap();
    drop(claim);
    gpus.refresh();
    let now = gpus.inventory().borrow().clone();
    assert!(now.problem.is_some());
    assert_eq!(now.devices[0].vram_used, GIB, "the last that was known");
    assert!(matches!(gpus.residency().await, Residency::Unknown(_)));
    drop(broken);
    gpus.refresh();
    assert_eq!(gpus.inventory().borrow().problem, None);
}

#[tokio::test(start_paused = true)]
async fn once_started_it_keeps_itself_fresh() {
    let dir = tempfile::tempdir().unwrap();
    let mut gpus = gpus(TWO_GPUS, &dir);
    gpus.start();
    gpus.start();
    let mut seen = gpus.inventory();
    let claim = Claim::hold(dir.path(), &[(B, GIB)]).unwrap();
    seen.wait_for(|i| i.devices[1].vram_used == GIB).await.unwrap();
    drop(claim);
    seen.wait_for(|i| i.devices[1].vram_used == 0).await.unwrap();
    drop(gpus);
    assert!(seen.wait_for(|_| false).await.is_err(), "the task ended with its owner");
}

#[test]
fn what_is_wrong_with_a_topology_is_told_with_its_line() {
    let device = |rest: &str| format!("[[device]]\nname = \"x\"\nuuid = \"{A}\"\n{rest}\n");
    let twice = format!("{}{}", device("vram = \"1 GiB\""), device("vram = \"1 GiB\""));
    let slice = |mig: &str| device(&format!("vram = \"20 GiB\"\nmig = [{mig}]"));
    let one = |profile: &str, uuid: &str| format!("{{ profile = \"{profile}\", uuid = \"{uuid}\" }}");
    for (text, line, words) in [
        (twice, "7", "was used above"),
        (device("vram = \"1 GiB\"\nfan = 3"), "5", "unknown field `fan`"),
        (device("vram = \"0\""), "4", "more than no memory"),
        (device("vram = \"lots\""), "4", "is no size"),
        (device("vram = 5"), "4", "expected a string"),
        (device(""), "1", "missing field `vram`"),
        (device("vram = \"1 GiB\"\nforeign_used = \"2 GiB\""), "5", "more foreign memory"),
        (device("vram = \"1 GiB\"\ncompute_capability = \"eight\""), "5", "no compute capability"),
        (device("vram = \"1 GiB\"\npci_bus_id = \"01\""), "5", "no PCI bus id"),
        ("[[device]]\nname = \"x\"\nuuid = \"GPU-1\"\nvram = \"1 GiB\"".into(), "3", "no GPU UUID"),
        (slice(&one("big", S0)), "5", "no MIG profile"),
        (slice(&one("1g.12gb", A)), "5", "no MIG UUID"),
        (slice(&format!("{}, {}", one("1g.5gb", S0), one("1g.5gb", S0))), "5", "was used above"),
        (slice(&format!("{}, {}", one("1g.12gb", S0), one("1g.12gb", S1))), "5", "more memory than their GPU"),
        ("device = 1\n[".into(), "2", ""),
    ] {
        let error = SimulatedGpus::from_toml(&text, PathBuf::new()).unwrap_err().to_string();
        assert!(error.contains(&format!("line {line}")) && error.contains(words), "{text}\n{error}");
    }
}

#[test]
fn uuids_are_kept_in_the_form_masks_have() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[[device]]\nname = \"x\"\nuuid = \"{}\"\nvram = \"1 GiB\"", A.replace("51", "AB"));
    let gpus = gpus(&text, &dir);
    assert_eq!(gpus.inventory().borrow().devices[0].uuid, A.replace("51", "ab"));
    assert_eq!(ByteSize::gib(1).0, gpus.inventory().borrow().devices[0].vram_total);
}
