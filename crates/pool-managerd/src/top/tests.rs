use pool_domain::device::DeviceHealth;
use pool_domain::{DeviceSnapshot, ReplicaId};
use pool_services::ReplicaSnapshot;
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;

fn device(index: u32) -> DeviceSnapshot {
    let health = if index == 0 { DeviceHealth::Ok } else { DeviceHealth::Fenced("something is left".into()) };
    DeviceSnapshot {
        vram_used: 8 << 30,
        vram_free: 16 << 30,
        vram_foreign: 2 << 30,
        health,
        ..pool_testkit::gpu(index, 24 << 30)
    }
}

fn replica(id: u16, state: &'static str) -> ReplicaSnapshot {
    ReplicaSnapshot { state, ..ReplicaSnapshot::idle(ReplicaId(id)) }
}

fn pool(id: &str, replicas: Vec<ReplicaSnapshot>) -> PoolSnapshot {
    PoolSnapshot {
        pool_id: id.parse().unwrap(),
        snapshot: 1,
        revision: 1,
        source: "file",
        engine: "stub".into(),
        model: format!("stub:{id}"),
        model_id: id.into(),
        aliases: Vec::new(),
        workload: "generate",
        hold: false,
        leases_waiting: 0,
        guards: Default::default(),
        replicas,
    }
}

fn screen() -> Screen {
    let mut screen = Screen::new("http://127.0.0.1:9200");
    let serves = ReplicaSnapshot {
        live: true,
        ready: true,
        active_leases: 4,
        slots_total: 4,
        device_mask: device(0).uuid,
        ..replica(0, "ready")
    };
    let waits = ReplicaSnapshot {
        next_start_in_ms: Some(4000),
        reason: "waiting for the backoff delay; crash: it ended".into(),
        ..replica(1, "waiting")
    };
    let chat = PoolSnapshot { leases_waiting: 5, ..pool("chat", vec![serves, waits]) };
    let other = PoolSnapshot { hold: true, ..pool("other", vec![replica(0, "idle")]) };
    let devices = vec![(device(0), 7 << 30), (device(1), 0)];
    let node = NodeSnapshot { simulated: true, devices, ..NodeSnapshot::default() };
    screen.take(Instant::now(), Ok((node, vec![chat, other])));
    screen
}

fn drawn(screen: &Screen, width: u16, height: u16, later: Duration) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let now = screen.seen.unwrap_or_else(Instant::now) + later;
    terminal.draw(|frame| view::draw(frame, screen, now)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

#[test]
fn everything_is_on_one_screen() {
    let lines = drawn(&screen(), 180, 16, Duration::from_millis(1500));
    let text = lines.join("\n");
    let line = |part: &str| lines.iter().find(|l| l.contains(part)).unwrap_or_else(|| panic!("{part}:\n{text}"));
    assert!(lines[0].contains("http://127.0.0.1:9200") && lines[0].contains("SIMULATED"), "{text}");
    // Seven of 24 GiB are ours, two foreign: of twenty cells.
    assert!(
        line("16.0 GiB of 24.0 GiB free").contains(&format!("{}{}{}", "█".repeat(6), "▒".repeat(2), "·".repeat(12))),
        "{text}"
    );
    assert!(line("chat").ends_with("chat"), "its device says who uses it: {text}");
    assert!(text.contains("fenced"), "{text}");
    assert!(line("4/4 +5").contains("ready"), "{text}");
    assert!(line("starts in 2.5 s").contains("waiting for the backoff delay"), "{text}");
    assert!(line("other").contains("idle (held)"), "{text}");
    assert!(lines.last().unwrap().contains("q ends"), "{text}");
}

#[test]
fn it_fits_wherever_it_is_drawn() {
    let mut screen = screen();
    for (width, height) in [(1, 1), (20, 5), (80, 24), (400, 100)] {
        drawn(&screen, width, height, Duration::ZERO);
    }
    screen = Screen::new("http://127.0.0.1:9200");
    assert!(drawn(&screen, 80, 10, Duration::ZERO).join(" ").contains("asking the daemon"));
}

#[test]
fn an_answer_that_does_not_come_leaves_the_last_one_and_says_so() {
    let mut screen = screen();
    screen.take(Instant::now(), Err(ControlError::Unreachable("connection refused".into())));
    let text = drawn(&screen, 120, 16, Duration::ZERO).join("\n");
    assert!(text.contains("old: ") && text.contains("connection refused") && text.contains("chat"), "{text}");
}

#[test]
fn keys_scroll_and_end_it() {
    let key = |code| Event::Key(KeyEvent::new(code, KeyModifiers::NONE));
    assert_eq!(wish(&key(KeyCode::Char('q'))), Some(Wish::End));
    assert_eq!(wish(&Event::Key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL))), Some(Wish::End));
    assert_eq!(wish(&key(KeyCode::Char('c'))), None);
    assert_eq!(wish(&key(KeyCode::Down)), Some(Wish::Scroll(1)));
    let mut screen = screen();
    for (by, first) in [(-1, 0), (1, 1), (1, 1), (-1, 0)] {
        screen.scroll(by);
        assert_eq!(screen.first, first);
    }
}
