//! How the screen of `top` looks.

use std::time::Duration;

use bytesize::ByteSize;
use pool_domain::{DeviceSnapshot, device::DeviceHealth};
use pool_services::{PoolSnapshot, ReplicaSnapshot};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use tokio::time::Instant;

use super::Screen;

/// Cells of a bar of memory.
const BAR: usize = 20;

fn heading() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

/// Draws it all into a frame of any size.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen, now: Instant) {
    let devices = u16::try_from(screen.node.devices.len()).unwrap_or(u16::MAX).max(1) + 1;
    let rows = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(devices.min(frame.area().height / 2)),
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(1),
    ];
    let [top, _, middle, _, rest, bottom] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(title(screen), top);
    draw_devices(frame, screen, middle);
    draw_pools(frame, screen, now, rest);
    frame.render_widget(foot(screen), bottom);
}

fn title(screen: &Screen) -> Line<'static> {
    let mut line = vec![Span::styled("pool-managerd", heading()), Span::raw(format!("  {}", screen.server))];
    if let Some(driver) = &screen.node.driver {
        line.push(Span::raw(format!("  driver {driver}")));
    }
    if screen.node.simulated {
        line.push("  SIMULATED GPUs".yellow());
    }
    Line::from(line)
}

fn foot(screen: &Screen) -> Line<'static> {
    match (&screen.problem, &screen.node.problem) {
        (Some(problem), _) => Line::from(format!("old: {problem}").red()),
        (None, Some(problem)) => Line::from(problem.clone().red()),
        (None, None) => Line::from("q ends, ↑ ↓ scroll".dim()),
    }
}

/// A bar of what is ours and what is foreign, of all there is.
fn bar(device: &DeviceSnapshot, reserved: u64) -> Line<'static> {
    let total = device.vram_total.max(1);
    let cells = |bytes: u64| (u128::from(bytes.min(total)) * BAR as u128).div_ceil(u128::from(total)) as usize;
    let ours = cells(reserved.max(device.vram_used.saturating_sub(device.vram_foreign)));
    let foreign = cells(device.vram_foreign).min(BAR - ours.min(BAR));
    let free = BAR.saturating_sub(ours + foreign);
    Line::from(vec!["█".repeat(ours).blue(), "▒".repeat(foreign).yellow(), "·".repeat(free).dim()])
}

fn device_row(device: &DeviceSnapshot, reserved: u64, pools: &[PoolSnapshot]) -> Row<'static> {
    let place =
        device.mig.as_ref().map_or_else(|| device.index.to_string(), |m| format!("{}:{}", device.index, m.index));
    let on_it = |r: &ReplicaSnapshot| r.live && r.device_mask.split(',').any(|d| d == device.uuid);
    let users: Vec<_> = pools.iter().filter(|p| p.replicas.iter().any(on_it)).map(|p| p.pool_id.to_string()).collect();
    let health = device.health.code();
    let health = if device.health == DeviceHealth::Ok { health.green() } else { health.red() };
    Row::new([
        Cell::from(place),
        Cell::from(device.name.clone()),
        Cell::from(bar(device, reserved)),
        Cell::from(format!("{} of {} free", ByteSize(device.vram_free), ByteSize(device.vram_total))),
        Cell::from(device.utilisation.map_or_else(|| "-".into(), |percent| format!("{percent} %"))),
        Cell::from(health),
        Cell::from(users.join(", ")),
    ])
}

fn draw_devices(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    if screen.node.devices.is_empty() {
        let text = if screen.seen.is_some() { "no devices" } else { "asking the daemon" };
        return frame.render_widget(Paragraph::new(text), area);
    }
    let rows = screen.node.devices.iter().map(|(device, reserved)| device_row(device, *reserved, &screen.pools));
    let widths = [
        Constraint::Length(5),
        Constraint::Max(28),
        Constraint::Length(BAR as u16),
        Constraint::Length(26),
        Constraint::Length(5),
        Constraint::Length(12),
        Constraint::Min(8),
    ];
    let header = Row::new(["GPU", "NAME", "VRAM", "", "BUSY", "HEALTH", "USED BY"]).style(heading());
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(2), area);
}

fn state_style(replica: &ReplicaSnapshot) -> Style {
    match replica.state {
        "ready" => Style::new().fg(Color::Green),
        "failed" | "fenced" => Style::new().fg(Color::Red),
        "suspect" | "waiting" | "draining" | "stopping" => Style::new().fg(Color::Yellow),
        "idle" => Style::new().add_modifier(Modifier::DIM),
        _ => Style::new().fg(Color::Cyan),
    }
}

fn countdown(replica: &ReplicaSnapshot, age: Duration) -> String {
    let Some(left) = replica.next_start_in_ms else { return String::new() };
    let left = Duration::from_millis(left).saturating_sub(age);
    format!("starts in {:.1} s  ", left.as_secs_f64())
}

fn replica_row(pool: &PoolSnapshot, nth: usize, replica: &ReplicaSnapshot, age: Duration) -> Row<'static> {
    let name = if nth == 0 { pool.pool_id.to_string() } else { String::new() };
    let held = if pool.hold { " (held)" } else { "" };
    let waiting =
        if nth == 0 && pool.leases_waiting > 0 { format!(" +{}", pool.leases_waiting) } else { String::new() };
    let breaker = if replica.breaker == "closed" { String::new() } else { format!("breaker {}  ", replica.breaker) };
    Row::new([
        Cell::from(name),
        Cell::from(replica.id.to_string()),
        Cell::from(format!("{}{held}", replica.state)).style(state_style(replica)),
        Cell::from(format!("{}/{}{waiting}", replica.active_leases, replica.slots_total)),
        Cell::from(replica.restart_count.to_string()),
        Cell::from(pool.model_id.clone()),
        Cell::from(format!("{}{breaker}{}", countdown(replica, age), replica.reason)),
    ])
}

fn draw_pools(frame: &mut Frame<'_>, screen: &Screen, now: Instant, area: Rect) {
    if screen.pools.is_empty() {
        let text = if screen.seen.is_some() { "no pools" } else { "" };
        return frame.render_widget(Paragraph::new(text), area);
    }
    let age = screen.seen.map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen));
    let rows = screen.pools.iter().skip(screen.first).flat_map(|pool| {
        pool.replicas.iter().enumerate().map(move |(nth, replica)| replica_row(pool, nth, replica, age))
    });
    let widths = [
        Constraint::Max(24),
        Constraint::Length(4),
        Constraint::Length(16),
        Constraint::Length(10),
        Constraint::Length(8),
        Constraint::Max(28),
        Constraint::Min(10),
    ];
    let header = Row::new(["POOL", "REPL", "STATE", "LEASES", "RESTARTS", "MODEL", "WHY"]).style(heading());
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(2), area);
}
