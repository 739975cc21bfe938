//! The points around what a driver writes down.

use fault_points::Point;

use super::Scribe;
use crate::ports::Phase;

/// Where an entry is about to be written, and where it has been.
pub(super) struct Around {
    pub(super) before: Option<Point>,
    pub(super) after: Option<Point>,
}

impl Scribe {
    pub(super) fn points(&self) -> Around {
        let (before, after) = match self {
            Self::Publish => (Some(Point::BeforeHandoff), Some(Point::AfterHandoff)),
            Self::Withdraw => (None, None),
            Self::Record(record) => match record.phase {
                Phase::Starting => (None, None),
                Phase::Ready { .. } => (Some(Point::BeforeReadyRecord), Some(Point::AfterReadyRecord)),
                Phase::Draining { .. } => (None, Some(Point::AfterDrainRecord)),
                Phase::Stopping => (Some(Point::BeforeStopRecord), Some(Point::AfterStopRecord)),
            },
            Self::Forget(_) => (Some(Point::BeforeForget), Some(Point::AfterForget)),
        };
        Around { before, after }
    }
}
