//! The faults that belong to a start rather than to a request.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;

use sim_claims::{Claim, SIM_DIR_ENV};

use crate::args::Args;
use crate::death::Death;
use crate::{log, reexec};

/// How a crash ends the process.
pub(crate) fn crash(args: &Args) -> Death {
    args.signal.map_or(Death::Exit(args.exit_code), Death::Signal)
}

/// Counts a failed start and says whether this start is to fail.
pub(crate) fn start_fails(args: &Args) -> io::Result<bool> {
    let (Some(times), Some(path)) = (args.fail_start_times, &args.state_file) else {
        return Ok(false);
    };
    let failed = read_count(path)?;
    if failed >= times {
        return Ok(false);
    }
    fs::write(path, format!("{}\n", failed + 1))?;
    log::error(format_args!("failing start {} of {times}, as asked", failed + 1));
    Ok(true)
}

fn read_count(path: &Path) -> io::Result<u64> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} holds no count: {error}", path.display()))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Claims the memory that was asked for on every visible device.
pub(crate) fn claim_vram(args: &Args) -> io::Result<Option<Claim>> {
    let Some(size) = args.vram else {
        return Ok(None);
    };
    let missing = |what: String| io::Error::new(io::ErrorKind::NotFound, format!("--vram needs {what}"));
    let dir = args
        .vram_dir
        .clone()
        .or_else(|| std::env::var_os(SIM_DIR_ENV).filter(|dir| !dir.is_empty()).map(PathBuf::from))
        .ok_or_else(|| missing(format!("--vram-dir, or {SIM_DIR_ENV} to name the simulation directory")))?;
    let visible = args.vram_on.clone().unwrap_or_else(|| std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default());
    let devices = devices(&visible, size.as_u64());
    if devices.is_empty() {
        return Err(missing("CUDA_VISIBLE_DEVICES to name devices".to_owned()));
    }
    let claim = Claim::hold(&dir, &devices)?;
    log::info(format_args!("claimed {size} on {visible}"));
    Ok(Some(claim))
}

/// Makes the file in shared memory that was asked for, which stays when the engine ends.
pub(crate) fn leave_shared_memory(args: &Args) -> io::Result<Option<File>> {
    let Some(name) = &args.shm_file else { return Ok(None) };
    let file = File::create(Path::new("/dev/shm").join(name))?;
    file.set_len(4096)?;
    log::info(format_args!("made shared memory {name}"));
    Ok(Some(file))
}

/// Writes to the log what no engine should.
pub(crate) fn say_bytes(args: &Args) -> io::Result<()> {
    use std::io::Write;
    args.log_bytes.as_ref().map_or(Ok(()), |bytes| io::stderr().write_all(&[&bytes.0, b"\n".as_slice()].concat()))
}

/// Takes memory of the host, every page of it.
pub(crate) fn take_memory(size: u64) -> Vec<u8> {
    log::info(format_args!("taking {size} bytes of memory"));
    // A page that holds zeros only may be nobody's.
    vec![1; usize::try_from(size).unwrap_or(usize::MAX)]
}

/// The key that requests must bear.
pub(crate) fn api_key(args: &Args) -> io::Result<Option<String>> {
    args.api_key_file.as_ref().map(|path| Ok(fs::read_to_string(path)?.trim_end().to_owned())).transpose()
}

fn devices(visible: &str, bytes: u64) -> Vec<(&str, u64)> {
    visible.split(',').map(str::trim).filter(|uuid| !uuid.is_empty()).map(|uuid| (uuid, bytes)).collect()
}

/// Starts the further processes that were asked for. They outlive this one, whichever way it ends.
pub(crate) fn spawn_family(args: &Args) -> io::Result<Vec<Child>> {
    if args.double_fork {
        reexec::spawn_detached()?;
    }
    (0..args.fork_children)
        .map(|_| {
            let child = reexec::spawn_sleeper()?;
            log::info(format_args!("child pid {}", child.id()));
            Ok(child)
        })
        .collect()
}

/// Floods both outputs from a thread of its own, so that a reader that falls behind does not stop the server.
pub(crate) fn flood_log() {
    std::thread::spawn(|| {
        use std::io::Write;
        for n in 0_u64.. {
            let line =
                format!("flood {n:012} the quick brown fox jumps over the lazy dog and does it again and again\n");
            if io::stdout().write_all(line.as_bytes()).is_err() || io::stderr().write_all(line.as_bytes()).is_err() {
                return;
            }
            // Far more than a log can take, without a whole core for it.
            if n % 1000 == 999 {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_mask_is_a_list_of_uuids() {
        assert_eq!(devices("GPU-1, GPU-2,", 5), [("GPU-1", 5), ("GPU-2", 5)]);
        assert!(devices("", 5).is_empty());
    }

    #[test]
    fn starts_fail_as_often_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("starts");
        let args = Args::try_parse_from(["--fail-start-times", "2", "--state-file", state.to_str().unwrap()]).unwrap();
        let fails: Vec<_> = (0..4).map(|_| start_fails(&args).unwrap()).collect();
        assert_eq!(fails, [true, true, false, false]);
        fs::write(&state, "x").unwrap();
        assert!(start_fails(&args).is_err());
    }
}
