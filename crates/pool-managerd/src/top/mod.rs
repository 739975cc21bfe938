//! `top`: the node as it is now, until a key ends it.

mod view;

use std::io::IsTerminal;
use std::time::Duration;

use pool_services::{ControlError, NodeSnapshot, PoolControl, PoolSnapshot};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::cli::ClientArgs;
use crate::commands::connect;
use crate::exit::{BUG, Exit, USAGE};

/// How often it asks the daemon.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often countdowns move.
const DRAW_EVERY: Duration = Duration::from_millis(250);
/// How long a look at the keyboard takes, and so the end of the thread that looks.
const KEY_SLICE: Duration = Duration::from_millis(200);

/// What is on the screen.
#[derive(Debug)]
pub(crate) struct Screen {
    /// Whom it asks.
    server: String,
    node: NodeSnapshot,
    pools: Vec<PoolSnapshot>,
    /// When these pictures came; countdowns run from there.
    seen: Option<Instant>,
    /// Why there are no newer ones.
    problem: Option<String>,
    /// The first pool that is shown.
    first: usize,
}

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    End,
    Scroll(isize),
    Draw,
}

fn wish(event: &Event) -> Option<Wish> {
    let key = match event {
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        Event::Resize(..) => return Some(Wish::Draw),
        _ => return None,
    };
    match key {
        KeyEvent { code: KeyCode::Char('c'), modifiers: KeyModifiers::CONTROL, .. }
        | KeyEvent { code: KeyCode::Char('q') | KeyCode::Esc, .. } => Some(Wish::End),
        KeyEvent { code: KeyCode::Down | KeyCode::Char('j'), .. } => Some(Wish::Scroll(1)),
        KeyEvent { code: KeyCode::Up | KeyCode::Char('k'), .. } => Some(Wish::Scroll(-1)),
        _ => None,
    }
}

/// Reads the keyboard on a thread of its own, because that waits, until nobody listens.
fn keys() -> mpsc::Receiver<Wish> {
    let (sender, wishes) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let wish = match event::poll(KEY_SLICE) {
                Ok(true) => event::read().ok().and_then(|event| wish(&event)),
                Ok(false) => None,
                // The terminal is gone.
                Err(_) => Some(Wish::End),
            };
            if wish.is_some_and(|wish| sender.blocking_send(wish).is_err()) {
                return;
            }
        }
    });
    wishes
}

impl Screen {
    fn new(server: &str) -> Self {
        let node = NodeSnapshot::default();
        Self { server: server.to_owned(), node, pools: Vec::new(), seen: None, problem: None, first: 0 }
    }

    fn take(&mut self, now: Instant, looked: Result<(NodeSnapshot, Vec<PoolSnapshot>), ControlError>) {
        match looked {
            Ok((node, pools)) => {
                (self.node, self.pools, self.seen, self.problem) = (node, pools, Some(now), None);
                self.scroll(0);
            }
            // The last pictures stay, and it is said that they are old.
            Err(error) => self.problem = Some(error.to_string()),
        }
    }

    fn scroll(&mut self, by: isize) {
        self.first = self.first.saturating_add_signed(by).min(self.pools.len().saturating_sub(1));
    }
}

/// Shows it all until a key or a signal ends it.
///
/// # Errors
/// When there is no terminal, or it cannot be used.
pub async fn top(args: &ClientArgs) -> Result<(), Exit> {
    if args.json || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let exit = Exit::new(USAGE, "`top` needs a terminal");
        return Err(exit.hinting("`pool-managerd status --json` and `devices --json` are for programs"));
    }
    let control = connect(args)?;
    let failed = |e: std::io::Error| Exit::new(BUG, format!("the terminal cannot be used: {e}"));
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let (mut screen, mut wishes) = (Screen::new(&args.server), keys());
    let (mut look, mut draw) = (interval(LOOK_EVERY), interval(DRAW_EVERY));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    draw.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let result = loop {
        tokio::select! {
            biased;
            wish = wishes.recv() => match wish {
                Some(Wish::Scroll(by)) => screen.scroll(by),
                Some(Wish::Draw) => {}
                Some(Wish::End) | None => break Ok(()),
            },
            _ = look.tick() => {
                // Keys wait for the answer no longer than the client's own limit.
                let looked = tokio::try_join!(control.node(), control.pools());
                screen.take(Instant::now(), looked);
            }
            _ = draw.tick() => {}
        }
        if let Err(error) = terminal.draw(|frame| view::draw(frame, &screen, Instant::now())) {
            break Err(failed(error));
        }
    };
    ratatui::restore();
    result
}

#[cfg(test)]
mod tests;
