//! Leases are hot, so each replica's are one atomic word {generation, open, limit, in use}. Only its driver opens,
//! closes and sets the limit; leases move `in use` by compare-and-swap on the same word, so no grant can follow a close.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pool_domain::Generation;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::seen::Seen;

/// The bit that no generation has.
const REVOKED: u32 = 1 << 31;
/// The largest limit.
const MOST: u16 = 0x3fff;

/// Why no slot was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Not Ready.
    Closed,
    /// Every slot is taken, or somebody waits for the next.
    Saturated,
}

/// The word taken apart: 32 bits of the generation, one of openness, one that says that somebody waits, 14 of limit, one
/// that says that somebody waits for the first lease, 15 of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    generation: u32,
    open: bool,
    awaited: bool,
    limit: u16,
    watched: bool,
    in_use: u16,
}

impl Word {
    fn unpack(w: u64) -> Self {
        Self {
            generation: (w >> 32) as u32,
            open: w & (1 << 31) != 0,
            awaited: w & (1 << 30) != 0,
            limit: ((w >> 16) & u64::from(MOST)) as u16,
            watched: w & (1 << 15) != 0,
            in_use: (w & 0x7fff) as u16,
        }
    }
    fn pack(self) -> u64 {
        (u64::from(self.generation) << 32)
            | (u64::from(self.open) << 31)
            | (u64::from(self.awaited) << 30)
            | (u64::from(self.limit & MOST) << 16)
            | (u64::from(self.watched) << 15)
            | u64::from(self.in_use)
    }
}

/// Where the word is kept. Another than std's lets loom look at every order of steps.
pub trait AtomicWord: Default {
    /// The word as it is.
    fn load(&self) -> u64;
    /// Replaces it in one step with what `f` makes of it, if that is anything; the word before in both cases.
    ///
    /// # Errors
    /// When `f` makes nothing of it.
    fn update(&self, f: impl FnMut(u64) -> Option<u64>) -> Result<u64, u64>;
}

impl AtomicWord for AtomicU64 {
    fn load(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
    fn update(&self, f: impl FnMut(u64) -> Option<u64>) -> Result<u64, u64> {
        self.fetch_update(Ordering::AcqRel, Ordering::Acquire, f)
    }
}

/// What wakes one task. A ring that nobody waits for is kept for the next who does.
pub trait Bell: Default {
    /// Rings it.
    fn ring(&self);
}

impl Bell for Notify {
    fn ring(&self) {
        self.notify_one();
    }
}

/// The admission word of one replica, in cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Admission<W: AtomicWord = AtomicU64, B: Bell = Notify> {
    word: W,
    idle: B,
    /// Told of the first lease that is granted, where the word is watched; whoever does not wait then is not told later.
    granted: Notify,
    /// Rung when there may be a slot for somebody who waits.
    desk: Arc<B>,
    born: Instant,
    /// When a lease was last given back: milliseconds after `born` and one, 0 for never.
    used: AtomicU64,
    /// How often something came from the engine for those who hold its slots, where that is seen.
    flow: AtomicU64,
    /// How fast that was.
    seen: Seen,
}

impl<W: AtomicWord, B: Bell> Default for Admission<W, B> {
    fn default() -> Self {
        Self::belled(Arc::default())
    }
}

/// The right to use one slot; given back on drop.
#[derive(Debug)]
pub struct SlotGuard<W: AtomicWord = AtomicU64, B: Bell = Notify> {
    admission: Arc<Admission<W, B>>,
    generation: u32,
}

#[expect(clippy::cast_possible_truncation, reason = "neighbouring generations differ in the low bits")]
fn tag(generation: Generation) -> u32 {
    generation.0 as u32 & !REVOKED
}

impl<W: AtomicWord, B: Bell> Admission<W, B> {
    /// Closed. `desk` is rung when there may be a slot for somebody who waits.
    #[must_use]
    pub fn belled(desk: Arc<B>) -> Self {
        let (born, used, flow) = (Instant::now(), AtomicU64::default(), AtomicU64::default());
        Self {
            word: W::default(),
            idle: B::default(),
            granted: Notify::new(),
            desk,
            born,
            used,
            flow,
            seen: Seen::default(),
        }
    }

    fn update(&self, f: impl Fn(Word) -> Option<Word>) -> Result<Word, Word> {
        self.word.update(|w| f(Word::unpack(w)).map(Word::pack)).map(Word::unpack).map_err(Word::unpack)
    }

    fn now(&self) -> Word {
        Word::unpack(self.word.load())
    }

    /// Grants up to `limit` leases of `generation`; those it has already stay counted.
    pub fn open(&self, generation: Generation, limit: u16) {
        let tag = tag(generation);
        let _ = self.update(|w| {
            let in_use = if w.generation == tag { w.in_use } else { 0 };
            Some(Word { generation: tag, open: true, limit: limit.min(MOST), in_use, ..w })
        });
        self.desk.ring();
    }

    /// The same for an engine of which nobody knows who uses it: every slot is taken, by the guards.
    pub fn open_taken(self: &Arc<Self>, generation: Generation, limit: u16) -> Vec<SlotGuard<W, B>> {
        let (tag, limit) = (tag(generation), limit.min(MOST));
        let _ = self.update(|w| Some(Word { generation: tag, open: true, limit, in_use: limit, ..w }));
        (0..limit).map(|_| SlotGuard { admission: Arc::clone(self), generation: tag }).collect()
    }

    /// Grants none from now on.
    pub fn close(&self) {
        let _ = self.update(|w| Some(Word { open: false, ..w }));
        self.idle.ring();
    }

    /// Grants none from now on if no lease is held; else nothing changes. Says whether none is.
    pub fn close_if_unused(&self) -> bool {
        let closed = self.update(|w| (w.in_use == 0).then_some(Word { open: false, ..w })).is_ok();
        if closed {
            self.idle.ring();
        }
        closed
    }

    /// For how long nobody has given a lease back; `None` if nobody ever did.
    #[must_use]
    pub fn unused_for(&self) -> Option<Duration> {
        let used = self.used.load(Ordering::Acquire).checked_sub(1)?;
        Some(self.born.elapsed().saturating_sub(Duration::from_millis(used)))
    }

    /// Something came from the engine for who holds a slot.
    pub fn flowed(&self) {
        self.flow.fetch_add(1, Ordering::Relaxed);
    }

    /// How fast what came was.
    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// How often it did.
    #[must_use]
    pub fn flow(&self) -> u64 {
        self.flow.load(Ordering::Relaxed)
    }

    /// Takes every lease back; their guards release nothing any more.
    pub fn revoke(&self) {
        // No guard has this generation, nor ever will: the one before would make its guards valid again.
        let nobody = |w: Word| w.generation | REVOKED;
        let _ = self.update(|w| Some(Word { generation: nobody(w), open: false, limit: 0, in_use: 0, ..w }));
        self.idle.ring();
        self.desk.ring();
    }

    /// Whether somebody waits. While one does, no slot is granted past the desk, and each that comes free rings for it.
    pub fn set_awaited(&self, awaited: bool) {
        let _ = self.update(|w| (w.awaited != awaited).then_some(Word { awaited, ..w }));
    }

    /// Takes a slot.
    ///
    /// # Errors
    /// When closed, when every slot is taken, or when somebody waits.
    pub fn acquire(self: &Arc<Self>) -> Result<SlotGuard<W, B>, Refused> {
        self.take(|w| !w.awaited)
    }

    /// Takes a slot for who waits longest.
    ///
    /// # Errors
    /// When closed, or when every slot is taken.
    pub fn acquire_for_first(self: &Arc<Self>) -> Result<SlotGuard<W, B>, Refused> {
        self.take(|_| true)
    }

    fn take(self: &Arc<Self>, may: impl Fn(Word) -> bool) -> Result<SlotGuard<W, B>, Refused> {
        let free = |w: &Word| w.open && w.in_use < w.limit && may(*w);
        match self.update(|w| free(&w).then(|| Word { in_use: w.in_use + 1, watched: false, ..w })) {
            Ok(w) => {
                if w.watched {
                    self.granted.notify_waiters();
                }
                Ok(SlotGuard { admission: Arc::clone(self), generation: w.generation })
            }
            Err(w) if w.open => Err(Refused::Saturated),
            Err(_) => Err(Refused::Closed),
        }
    }

    /// Leases held.
    #[must_use]
    pub fn in_use(&self) -> u16 {
        self.now().in_use
    }

    /// Resolves once a lease is held.
    pub async fn taken(&self) {
        loop {
            let told = self.granted.notified();
            tokio::pin!(told);
            // From here on none is missed: the first lease finds the word watched.
            told.as_mut().enable();
            if self.update(|w| (w.in_use == 0).then_some(Word { watched: true, ..w })).is_err() {
                return;
            }
            told.await;
        }
    }

    /// Slots not taken, 0 while closed.
    #[must_use]
    pub fn free(&self) -> u16 {
        let w = self.now();
        if w.open { w.limit.saturating_sub(w.in_use) } else { 0 }
    }

    /// Whether what is granted now is of this generation.
    #[must_use]
    pub fn is_of(&self, generation: Generation) -> bool {
        self.now().generation == tag(generation)
    }
}

impl Admission {
    /// Resolves once no lease is held while closed.
    pub async fn drained(&self) {
        loop {
            let told = self.idle.notified();
            let w = self.now();
            if !w.open && w.in_use == 0 {
                return;
            }
            told.await;
        }
    }
}

impl<W: AtomicWord, B: Bell> SlotGuard<W, B> {
    /// Whether it still holds: a revoked one does not.
    #[must_use]
    pub fn valid(&self) -> bool {
        self.admission.now().generation == self.generation
    }

    /// Whether it is of this generation.
    #[must_use]
    pub fn is_of(&self, generation: Generation) -> bool {
        self.generation == tag(generation)
    }

    /// Its generation, of which the word has the low 31 bits.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(u64::from(self.generation))
    }
}

impl<W: AtomicWord, B: Bell> Drop for SlotGuard<W, B> {
    fn drop(&mut self) {
        let g = self.generation;
        // Noted before the slot is free: who sees nothing held sees since when.
        let now = u64::try_from(self.admission.born.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.admission.used.store(now + 1, Ordering::Release);
        let before =
            self.admission.update(|w| (w.generation == g && w.in_use > 0).then(|| Word { in_use: w.in_use - 1, ..w }));
        match before {
            Ok(w) if !w.open && w.in_use == 1 => self.admission.idle.ring(),
            Ok(w) if w.awaited => self.admission.desk.ring(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_over_granted_never_negative_never_after_close() {
        let a = Arc::new(<Admission>::default());
        assert_eq!(a.acquire().unwrap_err(), Refused::Closed);
        a.open(Generation(7), 2);
        let (g1, _g2) = (a.acquire().unwrap(), a.acquire().unwrap());
        assert_eq!(a.acquire().unwrap_err(), Refused::Saturated);
        a.close();
        assert_eq!(a.acquire().unwrap_err(), Refused::Closed);
        a.open(Generation(7), 2);
        assert_eq!(a.in_use(), 2);
        a.revoke();
        assert_eq!((a.in_use(), g1.valid()), (0, false));
        a.open(Generation(8), 2);
        let _g3 = a.acquire().unwrap();
        drop(g1);
        assert_eq!(a.in_use(), 1, "a guard of an older generation releases nothing");
    }

    #[test]
    fn what_was_revoked_stays_revoked_when_a_later_generation_is_revoked_too() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 1);
        let first = a.acquire().unwrap();
        a.revoke();
        a.open(Generation(2), 1);
        let second = a.acquire().unwrap();
        a.revoke();
        assert!(!first.valid() && !second.valid());
        a.revoke();
        assert!(!first.valid() && !second.valid());
    }

    #[tokio::test(start_paused = true)]
    async fn closed_only_while_unused_and_its_last_use_is_remembered() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 2);
        assert_eq!(a.unused_for(), None);
        let lease = a.acquire().unwrap();
        assert!(!a.close_if_unused());
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(lease);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(a.unused_for(), Some(Duration::from_secs(5)));
        assert!(a.close_if_unused());
        assert_eq!(a.acquire().unwrap_err(), Refused::Closed);
    }

    #[test]
    fn nobody_passes_who_waits() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 2);
        let held = a.acquire().unwrap();
        a.set_awaited(true);
        assert_eq!(a.acquire().unwrap_err(), Refused::Saturated);
        let (first, second) = (a.acquire_for_first().unwrap(), a.acquire_for_first());
        assert_eq!(second.unwrap_err(), Refused::Saturated);
        drop((held, first));
        a.set_awaited(false);
        assert!(a.acquire().is_ok());
    }

    #[test]
    fn what_was_found_is_taken_from_the_first_moment_on() {
        let a = Arc::new(<Admission>::default());
        let mut strange = a.open_taken(Generation(3), 2);
        assert_eq!((a.acquire().unwrap_err(), a.in_use(), a.free()), (Refused::Saturated, 2, 0));
        strange.pop();
        assert!(a.acquire().unwrap().is_of(Generation(3)));
        a.revoke();
        assert!(!strange[0].valid());
    }

    #[test]
    fn many_threads_one_limit() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 5);
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    for _ in 0..2_000 {
                        let guard = a.acquire();
                        assert!(a.in_use() <= 5);
                        drop(guard);
                    }
                });
            }
        });
        assert_eq!(a.in_use(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_lease_is_told_to_who_waits_for_one_each_time() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 5);
        for _ in 0..2 {
            let waiting = tokio::spawn({
                let a = Arc::clone(&a);
                async move { a.taken().await }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            assert_eq!((a.in_use(), a.free()), (0, 5), "to be watched takes no slot");
            let g = a.acquire().unwrap();
            waiting.await.unwrap();
            a.taken().await;
            drop(g);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn drained_is_told_at_the_last_release() {
        let a = Arc::new(<Admission>::default());
        a.open(Generation(1), 5);
        let g = a.acquire().unwrap();
        a.close();
        let waiting = tokio::spawn({
            let a = Arc::clone(&a);
            async move { a.drained().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(g);
        waiting.await.unwrap();
    }
}
