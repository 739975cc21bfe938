//! What an XID, an error that NVIDIA's kernel driver reports of a GPU, means for the engines there.
//!
//! The defaults follow NVIDIA's own catalogue (Ampere and newer), also where other tools do not.

use std::collections::BTreeMap;

use crate::device::Verdict;

/// What follows from an XID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XidAction {
    /// It is counted, and that is all.
    Ignore,
    /// The engines on the device start again; the device stays.
    RestartEngine,
    /// Nothing new starts there until nothing more was heard for a while.
    Suspect,
    /// The engines there end in order, and nothing starts there until it was reset.
    Drain,
    /// It is gone: the engines there are ended at once.
    Lost,
}

impl XidAction {
    /// Every action.
    pub const ALL: [Self; 5] = [Self::Ignore, Self::RestartEngine, Self::Suspect, Self::Drain, Self::Lost];

    /// The action as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::RestartEngine => "restart_engine",
            Self::Suspect => "suspect",
            Self::Drain => "drain",
            Self::Lost => "lost",
        }
    }

    /// The action that a word names.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.code() == code)
    }

    /// What the catalogue says has to be done about an XID.
    #[must_use]
    pub fn by_catalogue(xid: u64) -> Self {
        match xid {
            8 | 11 | 13 | 25 | 31 | 32 | 39..=41 | 60 | 68..=72 | 75..=77 | 80 | 82..=86 | 88 | 89 | 94 | 96..=105 => {
                Self::RestartEngine
            }
            126..=135 | 139 => Self::RestartEngine,
            // 48 is an error of memory that was not corrected: the rows are mapped anew by a reset.
            46 | 48 | 62 | 64 | 95 | 109 | 110 | 119 | 120 | 136 | 140 | 143 | 151 | 155 | 156 | 158 => Self::Drain,
            79 => Self::Lost,
            14
            | 37
            | 38
            | 43
            | 44
            | 63
            | 66
            | 67
            | 92
            | 93
            | 106..=108
            | 121
            | 137
            | 141
            | 152
            | 153
            | 157
            | 160
            | 161 => Self::Ignore,
            // 45 follows another; 154 says that the driver's own verdict changed, which is read.
            45 | 154 => Self::Ignore,
            // Cables, NVLink, what is newer than the catalogue: nobody knows what it does to an engine.
            _ => Self::Suspect,
        }
    }
}

/// What follows from each XID on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct XidTable {
    /// Where somebody knows better than the catalogue.
    pub overrides: BTreeMap<u64, XidAction>,
}

impl XidTable {
    /// What follows from an XID.
    #[must_use]
    pub fn action(&self, xid: u64) -> XidAction {
        self.overrides.get(&xid).copied().unwrap_or_else(|| XidAction::by_catalogue(xid))
    }
}

/// What somebody has to do where this follows from this XID.
#[must_use]
pub fn verdict(xid: u64, action: XidAction) -> Verdict {
    match (action, xid) {
        (XidAction::Ignore | XidAction::Suspect, _) => Verdict::None,
        (XidAction::RestartEngine, _) => Verdict::RestartApp,
        (XidAction::Lost, _) | (XidAction::Drain, 151) => Verdict::RebootNode,
        (XidAction::Drain, _) => Verdict::ResetDevice,
    }
}

/// A few words about the better known ones, for people.
#[must_use]
pub fn meaning(xid: u64) -> &'static str {
    match xid {
        13 => "an exception in the graphics engine",
        31 => "a memory page fault of an engine",
        43 => "an engine that stopped computing",
        45 => "work that was taken away after another error",
        48 => "an error of its memory that could not be corrected",
        54 => "auxiliary power is not connected",
        62 | 109 => "its own scheduler halted",
        63 => "a row of its memory was remapped",
        64 => "a row of its memory could not be remapped",
        74 => "an error on NVLink",
        79 => "it has fallen off the bus",
        94 => "an error of its memory that only one engine met",
        95 => "an error of its memory that reached further than one engine",
        119 | 120 => "its firmware does not answer",
        154 => "the driver's verdict on it changed",
        _ => "an error that the driver reports",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue() {
        for (xids, action) in [
            (&[8, 13, 31, 32, 41, 69, 94, 100, 130, 139][..], XidAction::RestartEngine),
            (&[46, 48, 62, 64, 95, 109, 119, 120, 140, 158], XidAction::Drain),
            (&[79], XidAction::Lost),
            (&[14, 37, 43, 45, 63, 92, 107, 154, 161], XidAction::Ignore),
            (&[0, 54, 74, 78, 145, 149, 170, 999, u64::MAX], XidAction::Suspect),
        ] {
            for xid in xids {
                assert_eq!(XidAction::by_catalogue(*xid), action, "{xid}");
                assert!(!meaning(*xid).is_empty());
            }
        }
    }

    #[test]
    fn an_operator_knows_better() {
        let table = XidTable { overrides: [(94, XidAction::Drain), (79, XidAction::Ignore)].into() };
        assert_eq!((table.action(94), table.action(79)), (XidAction::Drain, XidAction::Ignore));
        assert_eq!(table.action(31), XidAction::RestartEngine);
        assert_eq!(verdict(94, table.action(94)), Verdict::ResetDevice);
        assert_eq!(verdict(79, table.action(79)), Verdict::None);
    }

    #[test]
    fn words_read_back() {
        for action in XidAction::ALL {
            assert_eq!(XidAction::from_code(action.code()), Some(action));
        }
        assert_eq!(XidAction::from_code("panic"), None);
        for verdict in Verdict::ALL {
            assert_eq!(Verdict::from_code(verdict.code()), Some(verdict));
        }
    }

    #[test]
    fn verdicts() {
        for (xid, verdict) in [
            (79, Verdict::RebootNode),
            (151, Verdict::RebootNode),
            (119, Verdict::ResetDevice),
            (94, Verdict::RestartApp),
            (63, Verdict::None),
            (54, Verdict::None),
        ] {
            assert_eq!(super::verdict(xid, XidAction::by_catalogue(xid)), verdict, "{xid}");
        }
    }
}
