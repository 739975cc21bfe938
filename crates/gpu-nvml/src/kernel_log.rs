//! The kernel's log, in which NVIDIA's driver writes the XIDs that its library tells as events: a second source, which also
//! tells while calls of the library hang. It is read from its end on, and nobody waits for it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use pool_domain::charges::Said;
use pool_domain::echo::Source;
use pool_domain::mask;
use pool_services::ports::Incident;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use crate::events::concerned;
use crate::shared::Shared;

/// A record of the kernel is never longer.
const RECORD: usize = 8 * 1024;
/// One wait: the thread ends no later than this after it is told to.
const SLICE: Duration = Duration::from_secs(1);
/// Between two looks at what has an end, as a file has.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// An XID as the kernel's log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    /// Where the GPU is, `dddd:bb:dd`.
    bus: String,
    /// GPU instance and, if it is told, compute instance.
    instance: Option<(u32, Option<u32>)>,
    xid: u64,
    pid: Option<u32>,
}

/// Opens it for [`follow`].
pub(crate) fn open(path: &Path) -> std::io::Result<File> {
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    // What was said before is not news. A pipe has no end to go to.
    let _ = file.seek(SeekFrom::End(0));
    Ok(file)
}

/// Tells of every XID in it, until `wanted` is closed.
pub(crate) fn follow(mut log: File, shared: &Shared, wanted: &Receiver<()>) {
    let (mut buffer, mut text) = (vec![0; RECORD], Vec::new());
    loop {
        let pause = match log.read(&mut buffer) {
            // A record of the kernel's log comes whole, and one at a time; of a file or a pipe, as much as there is.
            Ok(n) if n > 0 => {
                text.extend_from_slice(&buffer[..n]);
                tell_lines(&mut text, shared);
                Duration::ZERO
            }
            Ok(_) => LOOK_AGAIN,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let slice = Timespec { tv_sec: 1, tv_nsec: 0 };
                // That it could not be waited for only costs a look.
                match poll(&mut [PollFd::new(&log, PollFlags::IN)], Some(&slice)) {
                    Ok(_) => Duration::ZERO,
                    Err(_) => LOOK_AGAIN,
                }
            }
            // Records were overwritten before they were read, or a signal came.
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => Duration::ZERO,
            Err(error) => {
                tracing::debug!(%error, "the kernel's log");
                SLICE
            }
        };
        if wanted.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Tells of the whole lines, and leaves the rest, if that may still become one.
fn tell_lines(text: &mut Vec<u8>, shared: &Shared) {
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    for line in String::from_utf8_lossy(&text[..whole]).lines().filter_map(parse) {
        tell(&line, shared);
    }
    text.drain(..whole);
    if text.len() > RECORD {
        text.clear();
    }
}

fn tell(line: &Line, shared: &Shared) {
    let devices = shared.last().devices;
    let Some(gpu) = mask::named(&format!("{}.0", line.bus), &devices).map(|d| d.uuid.clone()) else {
        tracing::warn!(bus = line.bus, xid = line.xid, "the kernel reports an error of a GPU that is not known");
        return;
    };
    let instance = line.instance.map(|(gi, ci)| (gi, ci.unwrap_or(u32::MAX)));
    let (device, reach) = concerned(&gpu, instance, &devices);
    shared.tell(Incident { device, reach, said: Said::Xid(line.xid), pid: line.pid, source: Source::KernelLog });
}

/// `NVRM: Xid (PCI:dddd:bb:dd GPU-I:nn GPU-CI:nn): number, pid=…, …`, after whatever the kernel or a tool puts before it.
/// The instances, the pid and, with old drivers, the word `PCI` may be missing.
fn parse(line: &str) -> Option<Line> {
    let (_, rest) = line.split_once("NVRM: Xid (")?;
    let (place, rest) = rest.split_once("): ")?;
    let mut words = place.split(' ');
    let first = words.next()?;
    let bus = first.strip_prefix("PCI:").unwrap_or(first);
    let well_formed =
        bus.split(':').map(str::len).eq([4, 2, 2]) && bus.bytes().all(|b| b == b':' || b.is_ascii_hexdigit());
    let numbered = |prefix: &str| {
        let found = place.split(' ').find_map(|word| word.strip_prefix(prefix));
        found.and_then(|n| n.parse::<u32>().ok())
    };
    let mut parts = rest.split(", ");
    let number = parts.next()?.trim_end();
    let pid = parts.next().and_then(|part| part.strip_prefix("pid=")).and_then(|pid| pid.trim_end().parse().ok());
    Some(Line {
        bus: well_formed.then(|| bus.to_ascii_lowercase())?,
        instance: numbered("GPU-I:").map(|gi| (gi, numbered("GPU-CI:"))),
        // Some old drivers end the number with a comma and no space.
        xid: number.split(',').next()?.parse().ok()?,
        pid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the forms in which drivers write them, with what the kernel, `dmesg` and the journal put before.
    const LINES: &str = include_str!("../tests/fixtures/kernel.log");

    #[test]
    fn xids_are_found_among_whatever_else_the_driver_says() {
        let found: Vec<_> = LINES.lines().filter_map(parse).map(|l| (l.bus, l.instance, l.xid, l.pid)).collect();
        let at = |bus: &str, instance, xid, pid| (bus.to_owned(), instance, xid, pid);
        assert_eq!(
            found,
            [
                at("0000:3b:00", None, 79, None),
                at("0000:cb:00", None, 13, None),
                at("0000:cb:00", None, 109, Some(1_797_828)),
                at("0000:00:07", None, 31, Some(2_512_125)),
                at("0000:dc:00", None, 45, Some(1_818_990)),
                at("0000:01:00", Some((5, None)), 94, Some(7_194)),
                at("0000:3b:00", Some((1, Some(2))), 13, Some(9)),
                at("0000:9b:00", None, 119, Some(2_345)),
                at("0002:0a:00", None, 48, None),
                at("0000:01:00", None, 32, None),
                at("0000:44:00", None, 79, None),
                at("0000:03:00", None, 8, None),
            ]
        );
    }

    #[test]
    fn what_only_looks_like_one_is_none() {
        for line in [
            "",
            "NVRM: Xid (PCI:0000:3b:00): ",
            "NVRM: Xid (PCI:0000:3b:00): x, pid=1",
            "NVRM: Xid (PCI:0000:3b:00)",
            "NVRM: Xid (PCI:zz00:3b:00): 79, y",
            "NVRM: Xid (PCI:0000:3b): 79, y",
            "NVRM: Xid (): 79",
            "NVRM: Xid (PCI:0000:3b:00): 99999999999999999999, y",
            "nvidia-nvswitch0: SXid (PCI:0000:a9:00.0): 12028, Non-fatal, Link 62",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
