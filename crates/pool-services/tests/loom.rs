//! The admission word in every order in which two or three threads can take their steps.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;

use loom::sync::Notify;
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use loom::thread;
use pool_domain::Generation;
use pool_services::admission::{Admission, AtomicWord, Bell, SlotGuard};

struct Word(AtomicU64);

impl Default for Word {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl AtomicWord for Word {
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
    fn update(&self, f: impl FnMut(u64) -> Option<u64>) -> Result<u64, u64> {
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, f)
    }
}

struct Ring(Notify);

impl Default for Ring {
    fn default() -> Self {
        Self(Notify::new())
    }
}

impl Bell for Ring {
    fn ring(&self) {
        self.0.notify();
    }
}

type Gate = Admission<Word, Ring>;
type Guard = SlotGuard<Word, Ring>;

fn gate(limit: u16) -> (Arc<Gate>, Arc<Ring>) {
    let bell = Arc::new(Ring::default());
    let gate = Arc::new(Gate::belled(Arc::clone(&bell)));
    gate.open(Generation(1), limit);
    (gate, bell)
}

#[test]
fn never_more_are_granted_than_there_are() {
    loom::model(|| {
        let (gate, _) = gate(1);
        let holders = Arc::new(AtomicUsize::new(0));
        let user = |gate: Arc<Gate>, holders: Arc<AtomicUsize>| {
            move || {
                if let Ok(_guard) = gate.acquire() {
                    assert_eq!(holders.fetch_add(1, Ordering::AcqRel), 0, "two hold the one slot");
                    holders.fetch_sub(1, Ordering::AcqRel);
                }
            }
        };
        let threads = [(); 2].map(|()| thread::spawn(user(Arc::clone(&gate), Arc::clone(&holders))));
        for t in threads {
            t.join().unwrap();
        }
        assert_eq!(gate.in_use(), 0);
    });
}

#[test]
fn nothing_is_granted_after_a_close() {
    loom::model(|| {
        let (gate, _) = gate(2);
        let asker = thread::spawn({
            let gate = Arc::clone(&gate);
            move || [gate.acquire().ok(), gate.acquire_for_first().ok()]
        });
        gate.close();
        let then = gate.in_use();
        let guards: [Option<Guard>; 2] = asker.join().unwrap();
        assert_eq!(gate.in_use(), then);
        assert_eq!(guards.iter().flatten().count(), usize::from(then));
    });
}

/// The desk: it says that somebody waits, then it looks, then it sleeps.
fn wait(gate: &Arc<Gate>, bell: &Ring) -> Guard {
    gate.set_awaited(true);
    loop {
        match gate.acquire_for_first() {
            Ok(guard) => return guard,
            Err(_) => bell.0.wait(),
        }
    }
}

#[test]
fn who_waits_is_woken() {
    loom::model(|| {
        let (gate, bell) = gate(1);
        let held = gate.acquire().unwrap();
        let user = thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                drop(held);
                // If nobody waits yet this may be granted; then it is given back, too.
                drop(gate.acquire());
            }
        });
        let _guard = wait(&gate, &bell);
        user.join().unwrap();
        assert_eq!(gate.in_use(), 1);
    });
}

#[test]
fn nobody_comes_before_who_waits() {
    loom::model(|| {
        let (gate, bell) = gate(1);
        let held = gate.acquire().unwrap();
        gate.set_awaited(true);
        let user = thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                drop(held);
                assert!(gate.acquire().is_err());
            }
        });
        let _guard = wait(&gate, &bell);
        user.join().unwrap();
    });
}

#[test]
fn who_waits_is_woken_when_an_engine_comes() {
    loom::model(|| {
        let bell = Arc::new(Ring::default());
        let gate = Arc::new(Gate::belled(Arc::clone(&bell)));
        let driver = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.open(Generation(1), 1)
        });
        let _guard = wait(&gate, &bell);
        driver.join().unwrap();
    });
}

#[test]
fn a_guard_of_an_older_generation_releases_nothing() {
    loom::model(|| {
        let (gate, _) = gate(1);
        let old = gate.acquire().unwrap();
        let late = thread::spawn(move || drop(old));
        gate.revoke();
        gate.open(Generation(2), 1);
        let new = gate.acquire().unwrap();
        late.join().unwrap();
        assert!(new.valid());
        assert_eq!(gate.in_use(), 1);
    });
}
