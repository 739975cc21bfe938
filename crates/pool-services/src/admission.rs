//! Leases are hot, so each replica's are one atomic word {generation, open, limit, in use}. Only its driver opens,
//! closes and sets the limit; leases move `in use` by compare-and-swap on the same word, so no grant can follow a close.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pool_domain::Generation;
use tokio::sync::Notify;

/// The bit that no generation has.
const REVOKED: u32 = 1 << 31;

/// Why no slot was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Not Ready.
    Closed,
    /// Every slot is taken.
    Saturated,
}

/// The word taken apart: 32 bits of the generation, one of openness, 15 of limit, 16 of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    generation: u32,
    open: bool,
    limit: u16,
    in_use: u16,
}

impl Word {
    fn unpack(w: u64) -> Self {
        Self {
            generation: (w >> 32) as u32,
            open: w & (1 << 31) != 0,
            limit: ((w >> 16) & 0x7fff) as u16,
            in_use: (w & 0xffff) as u16,
        }
    }
    fn pack(self) -> u64 {
        (u64::from(self.generation) << 32)
            | (u64::from(self.open) << 31)
            | (u64::from(self.limit & 0x7fff) << 16)
            | u64::from(self.in_use)
    }
}

/// The admission word of one replica.
#[derive(Debug, Default)]
pub struct Admission {
    word: AtomicU64,
    idle: Notify,
    /// Told of the first lease that is granted; whoever does not wait then is not told later.
    granted: Notify,
}

/// The right to use one slot; given back on drop.
#[derive(Debug)]
pub struct SlotGuard {
    admission: Arc<Admission>,
    generation: u32,
}

impl Admission {
    fn update(&self, f: impl Fn(Word) -> Option<Word>) -> Result<Word, Word> {
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| f(Word::unpack(w)).map(Word::pack))
            .map(Word::unpack)
            .map_err(Word::unpack)
    }

    #[expect(clippy::cast_possible_truncation, reason = "neighbouring generations differ in the low bits")]
    fn tag(generation: Generation) -> u32 {
        generation.0 as u32 & !REVOKED
    }

    /// Grants up to `limit` leases of `generation`; those it has already stay counted.
    pub fn open(&self, generation: Generation, limit: u16) {
        let tag = Self::tag(generation);
        let _ = self.update(|w| {
            let in_use = if w.generation == tag { w.in_use } else { 0 };
            Some(Word { generation: tag, open: true, limit: limit.min(0x7fff), in_use })
        });
    }

    /// Grants none from now on.
    pub fn close(&self) {
        let _ = self.update(|w| Some(Word { open: false, ..w }));
        self.idle.notify_one();
    }

    /// Takes every lease back; their guards release nothing any more.
    pub fn revoke(&self) {
        // No guard has this generation, nor ever will: the one before would make its guards valid again.
        let nobody = |w: Word| w.generation | REVOKED;
        let _ = self.update(|w| Some(Word { generation: nobody(w), open: false, limit: 0, in_use: 0 }));
        self.idle.notify_one();
    }

    /// Takes a slot.
    ///
    /// # Errors
    /// When closed, or when every slot is taken.
    pub fn acquire(self: &Arc<Self>) -> Result<SlotGuard, Refused> {
        match self.update(|w| (w.open && w.in_use < w.limit).then(|| Word { in_use: w.in_use + 1, ..w })) {
            Ok(w) => {
                // Whoever waits for a lease waits while there is none.
                if w.in_use == 0 {
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
        Word::unpack(self.word.load(Ordering::Acquire)).in_use
    }

    /// Resolves once a lease is held.
    pub async fn taken(&self) {
        loop {
            let told = self.granted.notified();
            tokio::pin!(told);
            // From here on none is missed.
            told.as_mut().enable();
            if self.in_use() > 0 {
                return;
            }
            told.await;
        }
    }

    /// Slots not taken, 0 while closed.
    #[must_use]
    pub fn free(&self) -> u16 {
        let w = Word::unpack(self.word.load(Ordering::Acquire));
        if w.open { w.limit.saturating_sub(w.in_use) } else { 0 }
    }

    /// Resolves once no lease is held while closed.
    pub async fn drained(&self) {
        loop {
            let told = self.idle.notified();
            let w = Word::unpack(self.word.load(Ordering::Acquire));
            if !w.open && w.in_use == 0 {
                return;
            }
            told.await;
        }
    }
}

impl SlotGuard {
    /// Whether it still holds: a revoked one does not.
    #[must_use]
    pub fn valid(&self) -> bool {
        Word::unpack(self.admission.word.load(Ordering::Acquire)).generation == self.generation
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        let g = self.generation;
        let before =
            self.admission.update(|w| (w.generation == g && w.in_use > 0).then(|| Word { in_use: w.in_use - 1, ..w }));
        if before.is_ok_and(|w| !w.open && w.in_use == 1) {
            self.admission.idle.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_over_granted_never_negative_never_after_close() {
        let a = Arc::new(Admission::default());
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
        let a = Arc::new(Admission::default());
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

    #[test]
    fn many_threads_one_limit() {
        let a = Arc::new(Admission::default());
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
    async fn drained_is_told_at_the_last_release() {
        let a = Arc::new(Admission::default());
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
