//! Events for those who listen: a bounded past, and what comes. One task owns both; whoever reads too slowly is let go, and
//! comes back with the name of the last event it has.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::dto::EventView;

/// Events that are kept: of engines and pools, and of leases and streams, which come much more often.
const PAST: usize = 1024;
const PAST_OF_LEASES: usize = 256;
/// Events that may wait for one listener.
const BEHIND: usize = 512;
/// Most listeners.
const LISTENERS: usize = 256;

/// One event as it goes out.
#[derive(Debug)]
pub(super) struct Told {
    number: u64,
    pub(super) pool: String,
    /// Whose it is, where it is of a lease or stream that is somebody's.
    pub(super) tenant: Option<String>,
    pub(super) frame: Bytes,
}

/// What is there already, and what comes.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) past: Vec<Arc<Told>>,
    /// Something is missing before it.
    pub(super) gap: bool,
    pub(super) coming: mpsc::Receiver<Arc<Told>>,
}

#[derive(Debug)]
struct Listen {
    after: Option<String>,
    answer: oneshot::Sender<Option<Listening>>,
}

/// The way to listen.
#[derive(Debug, Clone)]
pub struct Feed(mpsc::Sender<Listen>);

impl Feed {
    /// Everything after the event of this name (or everything that is kept), and what comes. Nothing if too many listen.
    pub(super) async fn listen(&self, after: Option<String>) -> Option<Listening> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Listen { after, answer }).await.ok()?;
        answered.await.ok()?
    }
}

/// The past, and those who listen.
#[derive(Debug)]
pub struct History {
    /// Tells the events of one daemon from those of the one before.
    epoch: String,
    next: u64,
    past: VecDeque<Arc<Told>>,
    of_leases: VecDeque<Arc<Told>>,
    listeners: Vec<mpsc::Sender<Arc<Told>>>,
    asked: mpsc::Receiver<Listen>,
}

fn keep(past: &mut VecDeque<Arc<Told>>, told: Arc<Told>, most: usize) {
    if past.len() == most {
        past.pop_front();
    }
    past.push_back(told);
}

impl History {
    /// An empty one, and the way to it. `epoch` is to be another one with each daemon.
    #[must_use]
    pub fn begin(epoch: String) -> (Self, Feed) {
        let (tx, asked) = mpsc::channel(16);
        let (past, of_leases) = (VecDeque::new(), VecDeque::new());
        (Self { epoch, next: 1, past, of_leases, listeners: Vec::new(), asked }, Feed(tx))
    }

    /// Answers those who want to listen, for ever; to be dropped when something is to be told.
    pub async fn attend(&mut self) {
        while let Some(Listen { after, answer }) = self.asked.recv().await {
            // Who is gone takes no place.
            let _ = answer.send(self.listen(after.as_deref()));
        }
        std::future::pending::<()>().await;
    }

    fn listen(&mut self, after: Option<&str>) -> Option<Listening> {
        self.listeners.retain(|l| !l.is_closed());
        if self.listeners.len() >= LISTENERS {
            return None;
        }
        let (listener, coming) = mpsc::channel(BEHIND);
        self.listeners.push(listener);
        let mut past: Vec<_> = self.past.iter().chain(&self.of_leases).cloned().collect();
        past.sort_by_key(|told| told.number);
        let mut gap = false;
        if let Some(after) = after {
            let number = after.strip_prefix(&self.epoch).and_then(|rest| rest.strip_prefix('-')?.parse::<u64>().ok());
            match number.filter(|n| *n < self.next) {
                Some(number) => {
                    past.retain(|told| told.number > number);
                    gap = past.len() as u64 != self.next - 1 - number;
                }
                // Of another daemon, or none at all.
                None => gap = true,
            }
        }
        Some(Listening { past, gap, coming })
    }

    /// Tells and keeps an event.
    pub fn push(&mut self, event: &EventView, of_lease: bool) {
        let mut frame = format!("id: {}-{}\nevent: {}\ndata: ", self.epoch, self.next, event.event);
        // Writing to a String cannot fail, and every field is text or a number.
        let _ = writeln!(frame, "{}\n", serde_json::to_string(event).unwrap_or_default());
        let told = Arc::new(Told {
            number: self.next,
            pool: event.pool_id.clone(),
            tenant: event.tenant_id.clone(),
            frame: frame.into(),
        });
        self.next += 1;
        // Who is too slow finds the end of the stream, and comes back.
        self.listeners.retain(|l| l.try_send(Arc::clone(&told)).is_ok());
        if of_lease {
            keep(&mut self.of_leases, told, PAST_OF_LEASES);
        } else {
            keep(&mut self.past, told, PAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(leases: u64, others: u64) -> History {
        let (mut history, _) = History::begin("e".into());
        for n in 0..leases + others {
            let event = EventView { event: format!("k{n}"), human: "Näh".into(), ..EventView::default() };
            history.push(&event, n < leases);
        }
        history
    }

    fn names(l: &Listening) -> Vec<u64> {
        l.past.iter().map(|told| told.number).collect()
    }

    #[tokio::test]
    async fn who_comes_back_gets_what_it_missed_and_is_told_of_what_is_gone() {
        let mut history = history(2, 3);
        let all = history.listen(None).unwrap();
        assert_eq!((names(&all), all.gap), (vec![1, 2, 3, 4, 5], false));
        assert_eq!(
            all.past[0].frame,
            "id: e-1\nevent: k0\ndata: {\"event\":\"k0\",\"human\":\"Näh\",\"at\":\"\",\"generation\":0}\n\n"
        );
        for (after, past, gap) in [
            ("e-3", vec![4, 5], false),
            ("e-5", vec![], false),
            ("e-6", vec![1, 2, 3, 4, 5], true),
            ("d-3", vec![1, 2, 3, 4, 5], true),
            ("e3", vec![1, 2, 3, 4, 5], true),
            ("", vec![1, 2, 3, 4, 5], true),
        ] {
            let listening = history.listen(Some(after)).unwrap();
            assert_eq!((names(&listening), listening.gap), (past, gap), "{after}");
        }
        let mut listening = history.listen(Some("e-5")).unwrap();
        history.push(&EventView::default(), false);
        assert_eq!(listening.coming.recv().await.unwrap().number, 6);
    }

    #[test]
    fn the_past_is_bounded_and_leases_do_not_drive_out_the_rest() {
        let mut history = history(5000, 2);
        let all = history.listen(None).unwrap();
        assert_eq!((all.past.len(), names(&all)[0]), (PAST_OF_LEASES + 2, 5000 - PAST_OF_LEASES as u64 + 1));
        assert!(history.listen(Some("e-17")).unwrap().gap && !history.listen(Some("e-4990")).unwrap().gap);
    }

    #[tokio::test]
    async fn who_does_not_read_is_let_go_and_nobody_waits_for_it() {
        let mut history = history(0, 0);
        let mut slow = history.listen(None).unwrap();
        for _ in 0..2 * BEHIND {
            history.push(&EventView::default(), false);
        }
        let mut read = 0;
        while slow.coming.recv().await.is_some() {
            read += 1;
        }
        assert_eq!((read, history.listeners.len()), (BEHIND, 0));
        let all: Vec<_> = (0..LISTENERS).map(|_| history.listen(None).unwrap()).collect();
        assert!(history.listen(None).is_none());
        drop(all);
        assert!(history.listen(None).is_some());
    }
}
