//! The script as it plays: what is claimed, what was told, what blocks.
#![expect(
    clippy::disallowed_types,
    reason = "a C library is called from any thread; nothing is awaited under its lock"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nvml_wrapper_sys::bindings as sys;
use sim_claims::HeldClaim;

use crate::clock::{Moment, pause};
use crate::out::Code;
use crate::script::{Block, Device, EVERY_CALL, Event, Script, Slice};

/// Where claims lie beside the script.
pub(crate) const CLAIMS: &str = "claims";

/// How many places a split GPU has.
const PLACES: usize = 16;
/// Before the handle of every slice.
const SLICES: usize = 0x1000;

/// The script that belongs to a library.
pub(crate) fn beside(library: &Path) -> PathBuf {
    let mut name = library.as_os_str().to_owned();
    name.push(".toml");
    name.into()
}

/// The handle of the GPU that the slice of a handle is of.
pub(crate) fn gpu_of_slice(handle: usize) -> Option<usize> {
    handle.checked_sub(SLICES).map(|at| at / PLACES + 1)
}

/// A device as a handle names it. As with NVML, a handle is its place, whatever sits there by now.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    Gpu(&'a Device),
    Slice(&'a Device, &'a Slice),
}

impl<'a> Target<'a> {
    pub(crate) fn gpu(self) -> &'a Device {
        match self {
            Self::Gpu(gpu) | Self::Slice(gpu, _) => gpu,
        }
    }

    /// What slices have not got.
    pub(crate) fn whole(self) -> Result<&'a Device, Code> {
        match self {
            Self::Gpu(gpu) => Ok(gpu),
            Self::Slice(..) => Err(sys::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED),
        }
    }

    pub(crate) fn slice(self) -> Result<(&'a Device, &'a Slice), Code> {
        match self {
            Self::Gpu(_) => Err(sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
            Self::Slice(gpu, slice) => Ok((gpu, slice)),
        }
    }

    pub(crate) fn uuid(self) -> &'a str {
        match self {
            Self::Gpu(gpu) => &gpu.uuid,
            Self::Slice(_, slice) => &slice.uuid,
        }
    }
}

/// A claim as the driver sees it.
#[derive(Debug, Clone)]
struct Seen {
    claim: HeldClaim,
    since: Moment,
    ended: Option<Moment>,
}

/// A set of events.
#[derive(Debug, Default)]
struct Set {
    /// Kinds by the UUID of the GPU.
    hears: BTreeMap<String, u64>,
    told: BTreeSet<u32>,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    users: u32,
    path: PathBuf,
    stamp: Option<(u64, i64, i64, u64)>,
    pub(crate) script: Script,
    played: Option<Moment>,
    claims: Vec<Seen>,
    sets: BTreeMap<usize, Set>,
    next_set: usize,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<World>> {
    WORLD.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Every call but those that begin and end the use of the library goes through here.
pub(crate) fn call(name: &str, handle: Option<usize>, work: impl FnOnce(&mut World) -> Result<(), Code>) -> Code {
    let mut noted = false;
    loop {
        let mut guard = lock();
        let Some(world) = guard.as_mut().filter(|w| w.users > 0) else {
            return sys::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED;
        };
        world.look();
        match world.gate(name, handle) {
            Gate::Open => return work(world).err().unwrap_or(sys::nvmlReturn_enum_NVML_SUCCESS),
            Gate::Fails(code) => return code,
            Gate::Blocked(file) => noted = noted || note(&file, name),
        }
        drop(guard);
        pause(Duration::MAX);
    }
}

/// Begins the use of the library. `library`: where it was loaded from.
pub(crate) fn open(name: &str, library: &Path) -> Code {
    let mut noted = false;
    loop {
        let mut guard = lock();
        let world = guard.get_or_insert_with(World::default);
        if world.path.as_os_str().is_empty() {
            world.path = std::env::var_os(crate::SCRIPT_ENV).map_or_else(|| beside(library), PathBuf::from);
        }
        world.look();
        match world.gate(name, None) {
            Gate::Open if world.stamp.is_none() => return sys::nvmlReturn_enum_NVML_ERROR_UNKNOWN,
            Gate::Open => {
                world.users += 1;
                return sys::nvmlReturn_enum_NVML_SUCCESS;
            }
            Gate::Fails(code) => return code,
            Gate::Blocked(file) => noted = noted || note(&file, name),
        }
        drop(guard);
        pause(Duration::MAX);
    }
}

/// Each call that hangs is a line of the file for which it does.
fn note(file: &Path, name: &str) -> bool {
    // Gone again already: then it hangs no more.
    let written = OpenOptions::new().append(true).open(file).and_then(|mut f| writeln!(f, "{name}"));
    written.is_ok()
}

pub(crate) fn close() -> Code {
    let mut guard = lock();
    let Some(world) = guard.as_mut().filter(|w| w.users > 0) else {
        return sys::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED;
    };
    world.users -= 1;
    sys::nvmlReturn_enum_NVML_SUCCESS
}

/// Waits for an event of a set: its GPU's handle and itself.
pub(crate) fn wait(name: &str, set: usize, at_most: Duration) -> Result<(usize, Event), Code> {
    let began = Moment::now();
    loop {
        let mut found = None;
        let code = call(name, None, |world| {
            found = world.due(set)?;
            Ok(())
        });
        if code != sys::nvmlReturn_enum_NVML_SUCCESS {
            return Err(code);
        }
        if let Some(found) = found {
            return Ok(found);
        }
        let left = at_most.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Err(sys::nvmlReturn_enum_NVML_ERROR_TIMEOUT);
        }
        pause(left);
    }
}

enum Gate {
    Open,
    Fails(Code),
    Blocked(PathBuf),
}

impl World {
    /// Reads the script again if it is another one.
    fn look(&mut self) {
        let stamp = fs::metadata(&self.path).map(|m| (m.ino(), m.mtime(), m.mtime_nsec(), m.size())).ok();
        if stamp.is_none() || stamp == self.stamp {
            return;
        }
        let read = fs::read_to_string(&self.path).map_err(|e| e.to_string());
        match read.and_then(|text| Script::parse(&text).map_err(|e| e.to_string())) {
            Ok(script) => {
                self.script = script;
                self.stamp = stamp;
                self.played = Some(Moment::now());
            }
            Err(why) => {
                #[expect(clippy::print_stderr, reason = "whoever wrote the script has nowhere else to look")]
                if self.stamp != stamp {
                    eprintln!("nvml-standin: {}: {why}", self.path.display());
                }
                self.stamp = stamp;
            }
        }
    }

    fn gate(&self, name: &str, handle: Option<usize>) -> Gate {
        // Looking a device up by its place is a call of that device already.
        let gpu = handle.and_then(|handle| self.gpu_at(handle));
        let names = |call: &str| call == name || call == EVERY_CALL;
        let concerns = |block: &Block| {
            names(&block.call)
                && block.device.as_ref().is_none_or(|uuid| gpu.is_some_and(|gpu| gpu.uuid == *uuid))
                && block.while_file.exists()
        };
        if let Some(block) = self.script.block.iter().find(|block| concerns(block)) {
            return Gate::Blocked(block.while_file.clone());
        }
        let tables = gpu.map(|gpu| &gpu.errors).into_iter().chain([&self.script.errors]);
        match tables.flatten().find(|(call, _)| names(call)) {
            Some((_, code)) => Gate::Fails(*code),
            None => Gate::Open,
        }
    }

    /// The devices that are on the bus.
    pub(crate) fn present(&self) -> impl Iterator<Item = &Device> {
        self.script.device.iter().filter(|d| !d.gone)
    }

    fn gpu_at(&self, handle: usize) -> Option<&Device> {
        let place = if handle >= SLICES { (handle - SLICES) / PLACES } else { handle.checked_sub(1)? };
        self.present().nth(place)
    }

    pub(crate) fn target(&self, handle: usize) -> Result<Target<'_>, Code> {
        let gpu = self.gpu_at(handle).ok_or(sys::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST)?;
        if handle < SLICES {
            return Ok(Target::Gpu(gpu));
        }
        let place = u32::try_from((handle - SLICES) % PLACES).unwrap_or_default();
        let slice = gpu.mig.iter().find(|s| s.place == place);
        slice.map(|s| Target::Slice(gpu, s)).ok_or(sys::nvmlReturn_enum_NVML_ERROR_NOT_FOUND)
    }

    /// The handle of a GPU.
    pub(crate) fn handle(&self, uuid: &str) -> Option<usize> {
        self.present().position(|d| d.uuid == uuid).map(|at| at + 1)
    }

    /// The handle of the slice at a place of the GPU with this handle.
    pub(crate) fn slice_handle(&self, gpu: usize, place: u32) -> Result<usize, Code> {
        let device = self.target(gpu)?.whole()?;
        device.mig.iter().find(|s| s.place == place).ok_or(sys::nvmlReturn_enum_NVML_ERROR_NOT_FOUND)?;
        Ok(SLICES + (gpu - 1) * PLACES + place as usize)
    }

    fn read_claims(&mut self) {
        let dir = self.script.claims.clone().unwrap_or_else(|| self.path.with_file_name(CLAIMS));
        // A claim that cannot be read is half written, or somebody's own file: it holds nothing.
        let now = sim_claims::read_claims(&dir).unwrap_or_default();
        for seen in &mut self.claims {
            if seen.ended.is_none() && !now.contains(&seen.claim) {
                seen.ended = Some(Moment::now());
            }
        }
        for claim in now {
            if !self.claims.iter().any(|seen| seen.ended.is_none() && seen.claim == claim) {
                self.claims.push(Seen { claim, since: Moment::now(), ended: None });
            }
        }
        let free_after = Duration::from_millis(self.script.free_after_ms);
        self.claims.retain(|seen| seen.ended.is_none_or(|at| at.elapsed() < free_after));
    }

    /// Bytes used on a device.
    pub(crate) fn used(&mut self, handle: usize) -> Result<u64, Code> {
        self.read_claims();
        let taken_after = Duration::from_millis(self.script.taken_after_ms);
        let claimed = |uuid: &str| -> u64 {
            let here = self.claims.iter().filter(|s| s.claim.device.eq_ignore_ascii_case(uuid));
            here.filter(|s| s.since.elapsed() >= taken_after).map(|s| s.claim.bytes).fold(0, u64::saturating_add)
        };
        Ok(match self.target(handle)? {
            Target::Slice(_, slice) => claimed(&slice.uuid).min(slice.vram.0),
            Target::Gpu(gpu) => {
                let others = gpu.process.iter().map(|p| p.used.0).fold(gpu.unlisted.0, u64::saturating_add);
                let slices = gpu.mig.iter().map(|s| claimed(&s.uuid)).fold(claimed(&gpu.uuid), u64::saturating_add);
                others.saturating_add(slices).min(gpu.vram.0.saturating_sub(gpu.reserved.0))
            }
        })
    }

    /// Processes of a device with their bytes.
    pub(crate) fn processes(&mut self, handle: usize) -> Result<Vec<(u32, u64)>, Code> {
        self.read_claims();
        let target = self.target(handle)?;
        if self.script.hides_processes {
            return Ok(Vec::new());
        }
        let claims = self.claims.iter().filter(|s| s.ended.is_none());
        let ours = claims.filter(|s| s.claim.device.eq_ignore_ascii_case(target.uuid()));
        let others = match target {
            Target::Gpu(gpu) => gpu.process.as_slice(),
            Target::Slice(..) => &[],
        };
        Ok(ours.map(|s| (s.claim.pid, s.claim.bytes)).chain(others.iter().map(|p| (p.pid, p.used.0))).collect())
    }

    pub(crate) fn new_set(&mut self) -> usize {
        self.next_set += 1;
        self.sets.insert(self.next_set, Set::default());
        self.next_set
    }

    pub(crate) fn end_set(&mut self, set: usize) -> Result<(), Code> {
        self.sets.remove(&set).map(drop).ok_or(sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)
    }

    /// From now on the set hears of these kinds. What was before it is not told.
    pub(crate) fn hear(&mut self, set: usize, handle: usize, kinds: u64) -> Result<(), Code> {
        let uuid = self.target(handle)?.whole()?.uuid.clone();
        let past: Vec<u32> = self.happened().filter(|e| e.device == uuid).map(|e| e.id).collect();
        let set = self.sets.get_mut(&set).ok_or(sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if set.hears.insert(uuid, kinds).is_none() {
            set.told.extend(past);
        }
        Ok(())
    }

    fn happened(&self) -> impl Iterator<Item = &Event> {
        let playing = self.played.map(Moment::elapsed).unwrap_or_default();
        self.script.event.iter().filter(move |e| playing >= Duration::from_millis(e.after_ms))
    }

    fn due(&mut self, set: usize) -> Result<Option<(usize, Event)>, Code> {
        let hears = self.sets.get(&set).ok_or(sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        let heard = |e: &&Event| {
            !hears.told.contains(&e.id) && hears.hears.get(&e.device).is_some_and(|kinds| kinds & kind(e) != 0)
        };
        let Some(event) = self.happened().find(heard).cloned() else { return Ok(None) };
        let Some(handle) = self.handle(&event.device) else { return Ok(None) };
        if let Some(set) = self.sets.get_mut(&set) {
            set.told.insert(event.id);
        }
        Ok(Some((handle, event)))
    }
}

/// NVML's bit of an event.
pub(crate) fn kind(event: &Event) -> u64 {
    event.kind.unwrap_or(u64::from(sys::nvmlEventTypeXidCriticalError))
}
