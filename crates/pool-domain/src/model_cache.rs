//! Which models leave the cache when another one needs the room.

use thiserror::Error;

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// Its name there.
    pub key: String,
    /// Its bytes.
    pub bytes: u64,
    /// When it was used last, in any unit.
    pub used: u64,
    /// A pool uses it, or somebody fetches it: it stays.
    pub pinned: bool,
}

/// The room there is. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// What the cache may hold; unset = whatever the disk holds, and nothing is ever removed.
    pub cap: Option<u64>,
    /// Free on the disk.
    pub free: u64,
    /// Of that, what is left to others.
    pub reserve: u64,
}

/// Why there is no room.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NoRoom {
    /// The cap is in the way.
    #[error(
        "it needs {need} bytes and the cache may hold {cap}, of which models that pools use take {pinned}: raise `[models] cache_max`"
    )]
    Cap {
        /// Bytes to come.
        need: u64,
        /// Bytes allowed.
        cap: u64,
        /// Bytes that stay.
        pinned: u64,
    },
    /// The disk is too small.
    #[error(
        "it needs {need} bytes and the disk of the cache has {free} free, of which {reserve} stay free: make room, or set `[models] cache_max` so that models nobody uses are removed"
    )]
    Disk {
        /// Bytes to come.
        need: u64,
        /// Bytes free, with what could be removed.
        free: u64,
        /// Bytes that stay free.
        reserve: u64,
    },
}

/// The models that leave so that `need` more bytes can come, the one that was not used for longest first. Without a cap
/// nothing leaves.
///
/// # Errors
/// When there would not be room enough even so.
pub fn make_room(cached: &[Cached], need: u64, room: Room) -> Result<Vec<String>, NoRoom> {
    let sum = |cached: &mut dyn Iterator<Item = &Cached>| cached.fold(0u64, |sum, c| sum.saturating_add(c.bytes));
    let (mut held, pinned) = (sum(&mut cached.iter()), sum(&mut cached.iter().filter(|c| c.pinned)));
    let mut free = room.free;
    let mut leaving: Vec<&Cached> = cached.iter().filter(|c| !c.pinned && room.cap.is_some()).collect();
    leaving.sort_by(|a, b| (a.used, &a.key).cmp(&(b.used, &b.key)));
    let mut leaving = leaving.into_iter();
    let mut left = Vec::new();
    loop {
        let over = room.cap.is_some_and(|cap| held.saturating_add(need) > cap);
        let full = free < need.saturating_add(room.reserve);
        if !over && !full {
            return Ok(left);
        }
        let Some(next) = leaving.next() else {
            return Err(match room.cap {
                Some(cap) if over => NoRoom::Cap { need, cap, pinned },
                _ => NoRoom::Disk { need, free, reserve: room.reserve },
            });
        };
        held = held.saturating_sub(next.bytes);
        free = free.saturating_add(next.bytes);
        left.push(next.key.clone());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cached(key: &str, bytes: u64, used: u64, pinned: bool) -> Cached {
        Cached { key: key.into(), bytes, used, pinned }
    }

    #[test]
    fn the_one_not_used_for_longest_leaves_first_and_a_pools_own_never() {
        let all = [cached("new", 4, 9, false), cached("old", 4, 1, false), cached("pool", 4, 0, true)];
        let room = |cap, free| Room { cap, free, reserve: 1 };
        assert_eq!(make_room(&all, 8, room(Some(20), 100)), Ok(vec![]));
        assert_eq!(make_room(&all, 9, room(Some(20), 100)), Ok(vec!["old".into()]));
        assert_eq!(make_room(&all, 16, room(Some(20), 100)), Ok(vec!["old".into(), "new".into()]));
        assert_eq!(make_room(&all, 17, room(Some(20), 100)), Err(NoRoom::Cap { need: 17, cap: 20, pinned: 4 }));
        // The disk can be smaller than the cap.
        assert_eq!(make_room(&all, 8, room(Some(100), 6)), Ok(vec!["old".into()]));
        assert_eq!(make_room(&all, 18, room(Some(100), 6)), Err(NoRoom::Disk { need: 18, free: 14, reserve: 1 }));
        // Nobody said that anything may leave.
        assert_eq!(make_room(&all, 8, room(None, 6)), Err(NoRoom::Disk { need: 8, free: 6, reserve: 1 }));
    }

    proptest! {
        #[test]
        fn what_is_pinned_stays_and_what_leaves_makes_the_room(
            all in proptest::collection::vec((0u64..100, 0u64..10, any::<bool>()), 0..12),
            (need, cap, free) in (0u64..300, proptest::option::of(0u64..500), 0u64..300),
        ) {
            let all: Vec<_> = all.into_iter().enumerate().map(|(i, (b, u, p))| cached(&i.to_string(), b, u, p)).collect();
            let room = Room { cap, free, reserve: 5 };
            if let Ok(left) = make_room(&all, need, room) {
                let gone = |c: &&Cached| left.contains(&c.key);
                prop_assert!(all.iter().filter(gone).all(|c| !c.pinned));
                let freed: u64 = all.iter().filter(gone).map(|c| c.bytes).sum();
                let stays: u64 = all.iter().map(|c| c.bytes).sum::<u64>() - freed;
                prop_assert!(cap.is_none_or(|cap| stays + need <= cap));
                prop_assert!(free + freed >= need + 5);
                prop_assert!(cap.is_some() || left.is_empty());
            }
        }
    }
}
