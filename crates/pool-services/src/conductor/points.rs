//! Where a test may interfere with a reload.

use fault_points::Point;
use pool_domain::rollout::Step;

/// What is passed once a step is done.
pub(super) fn done(step: &Step) -> Point {
    match step {
        Step::Verify => Point::ReloadVerified,
        Step::Stop(_) => Point::ReloadStopped,
        Step::Change(_) => Point::ReloadChanged,
        Step::Add(_) => Point::ReloadAdded,
        Step::Start(_) => Point::ReloadStarted,
        Step::Commit => Point::AfterCommit,
        Step::Flip { .. } => Point::AfterFlip,
        Step::Retire(_) => Point::AfterRetire,
    }
}

/// What is passed once it is undone.
pub(super) fn undone(step: &Step) -> Option<Point> {
    match step {
        Step::Stop(_) => Some(Point::UndoneStop),
        Step::Change(_) => Some(Point::UndoneChange),
        Step::Add(_) => Some(Point::UndoneAdd),
        Step::Start(_) => Some(Point::UndoneStart),
        Step::Commit => Some(Point::UndoneCommit),
        // They touch nothing, or are never undone.
        Step::Verify | Step::Flip { .. } | Step::Retire(_) => None,
    }
}
