//! A power cut, made by a file system of its own in a file: what that file holds at a moment is what a disk would hold
//! whose power was cut then. Needs root, loop devices and ext4; elsewhere it says so and passes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pool_domain::ReplicaKey;
use pool_domain::{Generation, ReplicaId};
use pool_services::ports::StateLedger;
use state_dir::StateDir;

/// Runs a program; false when it is missing or fails.
fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// A file system in a file, mounted; unmounted when dropped, also by a test that fails.
struct Disk {
    at: PathBuf,
}

impl Disk {
    fn mount(image: &Path, at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        // Nothing goes to the disk by the clock, or because ext4 guesses what was meant: only what was asked to.
        let options = ["-o", "loop,commit=600,noauto_da_alloc", image.to_str().unwrap(), at.to_str().unwrap()];
        run("mount", &options).then_some(Self { at })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        assert!(run("umount", &[self.at.to_str().unwrap()]) || std::thread::panicking(), "left mounted");
    }
}

fn key() -> ReplicaKey {
    ReplicaKey { pool: "chat".parse().unwrap(), replica: ReplicaId(0) }
}

#[tokio::test]
async fn what_counts_as_written_is_there_after_a_power_cut() {
    let home = tempfile::tempdir().unwrap();
    let image = home.path().join("disk");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    if !run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]) {
        eprintln!("skipped: there is no mkfs.ext4");
        return;
    }
    let Some(disk) = Disk::mount(&image, home.path().join("live")) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    let state = StateDir::open(disk.at.join("state")).unwrap();
    for generation in 1..=5 {
        // Not asked to be durable: that it is lost shows that the cut is one.
        fs::write(disk.at.join(format!("careless-{generation}")), generation.to_string()).unwrap();
        state.intend(&key(), Generation(generation)).await.unwrap();
        state.set_hold(&key().pool, generation % 2 == 1).await.unwrap();

        let cut = home.path().join(format!("cut-{generation}"));
        fs::copy(&image, &cut).unwrap();
        let after = Disk::mount(&cut, home.path().join(format!("after-{generation}"))).unwrap();
        let careless = fs::read_to_string(after.at.join(format!("careless-{generation}"))).unwrap_or_default();
        assert_ne!(careless, generation.to_string(), "the cut lost nothing, so it shows nothing");
        let found = StateDir::open(after.at.join("state")).unwrap();
        assert_eq!(found.last_generation(&key()).await, Generation(generation));
        assert_eq!(found.held(&key().pool).await, generation % 2 == 1);
        drop(found);
        fs::remove_file(cut).unwrap();
    }
    drop(state);
}
