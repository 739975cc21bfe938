//! Asking the real engine.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use pool_domain::estimate::{
    EstimateError, FlashAttention, KvType, LlamaCppSettings, MIB, Outputs, Overheads, estimate_single,
};
use pool_domain::model::ModelProfile;

use crate::error::{Error, Result};
use crate::estimates::builder::Shape;
use crate::process;

pub(super) const CONTEXTS: [u64; 3] = [4096, 32_768, 131_072];
pub(super) const TYPES: [KvType; 3] = [KvType::F16, KvType::Q8_0, KvType::Q4_0];
pub(super) const SLOTS: [u32; 2] = [1, 4];

/// One question to the engine and both answers.
pub(super) struct Case {
    pub(super) context: u64,
    pub(super) kv: KvType,
    pub(super) slots: u32,
    pub(super) flash: bool,
    pub(super) theirs: Sizes,
    pub(super) ours: Sizes,
}

/// Model, context, compute, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) model: u64,
    pub(super) context: u64,
    pub(super) compute: u64,
}

impl Sizes {
    pub(super) fn total(self) -> u64 {
        self.model + self.context + self.compute
    }
}

/// All cases of one shape.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    /// Bytes of the tensors.
    pub(super) bytes: u64,
    pub(super) ollama: [u64; 4],
    pub(super) cases: Vec<Case>,
    /// With hardly any vocabulary, without and with flash attention.
    pub(super) bare: Vec<Case>,
}

/// Runs every case of a shape.
pub(super) fn shape(shape: &Shape, file: &Path, bare_file: &Path) -> Result<Row> {
    let profile = read(file)?;
    let mut cases = Vec::new();
    for context in CONTEXTS {
        for slots in SLOTS {
            for kv in TYPES {
                cases.push(case(&profile, file, context, kv, slots, true)?);
            }
            if context < CONTEXTS[2] {
                cases.push(case(&profile, file, context, KvType::F16, slots, false)?);
            }
        }
    }
    let bare = read(bare_file)?;
    let bare = [(CONTEXTS[0], true), (CONTEXTS[1], true), (CONTEXTS[0], false), (CONTEXTS[1], false)]
        .into_iter()
        .map(|(context, flash)| case(&bare, bare_file, context, KvType::F16, 1, flash))
        .collect::<Result<_>>()?;
    Ok(Row { name: shape.name, kind: shape.kind, bytes: profile.tensor_bytes, ollama: shape.ollama, cases, bare })
}

fn read(file: &Path) -> Result<ModelProfile> {
    model_store::profile(file).map_err(|e| Error::Check(format!("{} {e}", file.display())))
}

/// Whether two sizes agree within `percent`, or within `mib` if that is more.
pub(super) fn near(theirs: u64, ours: u64, mib: u64, percent: u64) -> bool {
    theirs.abs_diff(ours) <= mib.max(theirs * percent / 100)
}

impl Case {
    /// Which goals are missed. Both sides are whole MiB, cut off, so 1 MiB is no difference.
    pub(super) fn misses(&self) -> Vec<&'static str> {
        let (t, o) = (self.theirs, self.ours);
        let goals = [
            ("weights", near(t.model, o.model, 1, 1)),
            ("context", near(t.context, o.context, 1, 1)),
            ("total", near(t.total(), o.total(), 100, 3)),
        ];
        goals.into_iter().filter(|(_, met)| !met).map(|(name, _)| name).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flash = if self.flash { "" } else { " without flash attention" };
        write!(f, "{} tokens, {} slots, {}{flash}: ", self.context, self.slots, self.kv)?;
        write!(f, "engine {:?}, estimate {:?}", self.theirs, self.ours)
    }
}

/// What misses a goal, for people.
pub(super) fn misses(rows: &[Row]) -> Vec<String> {
    let of = |row: &Row| -> Vec<String> {
        let cases = row.cases.iter().chain(&row.bare);
        cases.filter(|c| !c.misses().is_empty()).map(|c| format!("{} {c}: {:?}", row.name, c.misses())).collect()
    };
    rows.iter().flat_map(of).collect()
}

fn case(profile: &ModelProfile, file: &Path, context: u64, kv: KvType, slots: u32, flash: bool) -> Result<Case> {
    let ours =
        estimate(profile, context, kv, slots, flash).map_err(|e| Error::Check(format!("{}: {e}", file.display())))?;
    Ok(Case { context, kv, slots, flash, theirs: ask(file, context, kv, slots, flash)?, ours })
}

/// Our answer, for a build without a GPU.
pub(super) fn estimate(
    profile: &ModelProfile,
    context: u64,
    kv: KvType,
    slots: u32,
    flash: bool,
) -> std::result::Result<Sizes, EstimateError> {
    let settings = LlamaCppSettings {
        context,
        slots,
        kv_type_k: kv,
        kv_type_v: kv,
        flash_attention: if flash { FlashAttention::On } else { FlashAttention::Off },
        gpu_layers: Some(0),
        outputs: Outputs::Batch,
        ..LlamaCppSettings::default()
    };
    let host = estimate_single(profile, &settings, Overheads::NONE)?.host;
    Ok(Sizes { model: host.weights / MIB, context: host.kv / MIB, compute: host.compute / MIB })
}

/// What `llama-fit-params` prints for the host, where a CPU build puts everything.
fn ask(file: &Path, context: u64, kv: KvType, slots: u32, flash: bool) -> Result<Sizes> {
    let mut command = Command::new(process::root().join("target/engine/source/bin/llama-fit-params"));
    command.arg("-m").arg(file).args(["-c", &context.to_string(), "-np", &slots.to_string()]);
    command.args(["-ctk", kv.name(), "-ctv", kv.name(), "-fa", if flash { "on" } else { "off" }]);
    command.args(["--no-repack", "--fit-print", "on"]);
    let output = command.stdin(Stdio::null()).output().map_err(|source| Error::Start {
        command: "llama-fit-params (build it with `cargo xtask engine --from-source`)".to_owned(),
        source,
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let sizes = text.lines().find_map(|line| {
        let mut numbers = line.strip_prefix("Host ")?.split_whitespace().map(str::parse);
        let mut next = || numbers.next().and_then(std::result::Result::ok);
        Some(Sizes { model: next()?, context: next()?, compute: next()? })
    });
    sizes.ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr);
        let end: Vec<&str> = errors.lines().rev().take(4).collect();
        Error::Check(format!("llama-fit-params says nothing about {}: {}", file.display(), end.join(" | ")))
    })
}
