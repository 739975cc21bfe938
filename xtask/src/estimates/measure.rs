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
    /// Other settings; only some shapes have them.
    pub(super) options: Vec<Variant>,
}

/// One other setting and both answers; none is a refusal.
pub(super) struct Variant {
    pub(super) name: &'static str,
    pub(super) theirs: Option<Sizes>,
    pub(super) ours: Option<Sizes>,
}

/// Shapes that other settings are tried on.
pub(super) const VARIED: [&str; 5] =
    ["Llama-3.1-8B", "Gemma-3-4B", "gpt-oss-20B", "DeepSeek-V2-Lite", "Granite-4-H-tiny"];

/// Other settings, by what the engine's command line says; 32k and one slot where it does not say otherwise.
#[rustfmt::skip]
fn variants() -> [(&'static str, LlamaCppSettings); 11] {
    let base = settings(CONTEXTS[1], KvType::F16, 1, true);
    let types = |kv_type_k, kv_type_v| LlamaCppSettings { kv_type_k, kv_type_v, ..base };
    [
        ("-c 0 -np 2", LlamaCppSettings { context: 0, slots: 2, ..base }),
        ("-c 300", LlamaCppSettings { context: 300, ..base }),
        ("-c 10000 -np 3", LlamaCppSettings { context: 10_000, slots: 3, ..base }),
        ("-np 16", LlamaCppSettings { slots: 16, ..base }),
        ("-np 4 --swa-full", LlamaCppSettings { slots: 4, swa_full: true, ..base }),
        ("-ub 128", LlamaCppSettings { ubatch: 128, ..base }),
        ("-ub 2048", LlamaCppSettings { ubatch: 2048, ..base }),
        ("-b 256", LlamaCppSettings { batch: 256, ..base }),
        ("-ctk q8_0 -ctv q4_0", types(KvType::Q8_0, KvType::Q4_0)),
        ("-ctk iq4_nl -ctv q5_1", types(KvType::Iq4Nl, KvType::Q5_1)),
        ("-ctk f32 -ctv bf16", types(KvType::F32, KvType::Bf16)),
    ]
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
    let mut options = Vec::new();
    for (name, settings) in variants() {
        if VARIED.contains(&shape.name) {
            let theirs = ask(file, &settings).ok();
            options.push(Variant { name, theirs, ours: answer(&profile, &settings).ok() });
        }
    }
    let bytes = profile.tensor_bytes;
    Ok(Row { name: shape.name, kind: shape.kind, bytes, ollama: shape.ollama, cases, bare, options })
}

fn read(file: &Path) -> Result<ModelProfile> {
    model_store::profile(file).map_err(|e| Error::Check(format!("{} {e}", file.display())))
}

/// Whether two sizes agree within `percent`, or within `mib` if that is more.
pub(super) fn near(theirs: u64, ours: u64, mib: u64, percent: u64) -> bool {
    theirs.abs_diff(ours) <= mib.max(theirs * percent / 100)
}

/// Which goals are missed. Both sides are whole MiB, cut off, so 1 MiB is no difference.
fn missed(t: Sizes, o: Sizes) -> Vec<&'static str> {
    let goals = [
        ("weights", near(t.model, o.model, 1, 1)),
        ("context", near(t.context, o.context, 1, 1)),
        ("total", near(t.total(), o.total(), 100, 3)),
    ];
    goals.into_iter().filter(|(_, met)| !met).map(|(name, _)| name).collect()
}

impl Case {
    /// Which goals are missed.
    pub(super) fn misses(&self) -> Vec<&'static str> {
        missed(self.theirs, self.ours)
    }
}

impl Variant {
    /// Whether the goals are met, or both refuse.
    pub(super) fn met(&self) -> bool {
        match (self.theirs, self.ours) {
            (Some(theirs), Some(ours)) => missed(theirs, ours).is_empty(),
            (theirs, ours) => theirs == ours,
        }
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
        let missed = cases.filter(|c| !c.misses().is_empty()).map(|c| format!("{} {c}: {:?}", row.name, c.misses()));
        let varied = row
            .options
            .iter()
            .filter(|v| !v.met())
            .map(|v| format!("{} {}: engine {:?}, estimate {:?}", row.name, v.name, v.theirs, v.ours));
        missed.chain(varied).collect()
    };
    rows.iter().flat_map(of).collect()
}

fn settings(context: u64, kv: KvType, slots: u32, flash: bool) -> LlamaCppSettings {
    LlamaCppSettings {
        context,
        slots,
        kv_type_k: kv,
        kv_type_v: kv,
        flash_attention: if flash { FlashAttention::On } else { FlashAttention::Off },
        // A build without a GPU, asked by a tool that wants logits for whole batches.
        gpu_layers: Some(0),
        outputs: Outputs::Batch,
        ..LlamaCppSettings::default()
    }
}

fn case(profile: &ModelProfile, file: &Path, context: u64, kv: KvType, slots: u32, flash: bool) -> Result<Case> {
    let ours =
        estimate(profile, context, kv, slots, flash).map_err(|e| Error::Check(format!("{}: {e}", file.display())))?;
    let theirs = ask(file, &settings(context, kv, slots, flash))?;
    Ok(Case { context, kv, slots, flash, theirs, ours })
}

/// Our answer.
pub(super) fn estimate(
    profile: &ModelProfile,
    context: u64,
    kv: KvType,
    slots: u32,
    flash: bool,
) -> std::result::Result<Sizes, EstimateError> {
    answer(profile, &settings(context, kv, slots, flash))
}

fn answer(profile: &ModelProfile, settings: &LlamaCppSettings) -> std::result::Result<Sizes, EstimateError> {
    let host = estimate_single(profile, settings, Overheads::NONE)?.host;
    Ok(Sizes { model: host.weights / MIB, context: host.kv / MIB, compute: host.compute / MIB })
}

/// What `llama-fit-params` prints for the host, where a CPU build puts everything.
fn ask(file: &Path, s: &LlamaCppSettings) -> Result<Sizes> {
    let mut command = Command::new(process::root().join("target/engine/source/bin/llama-fit-params"));
    command.arg("-m").arg(file).args(["-c", &s.context.to_string(), "-np", &s.slots.to_string()]);
    command.args(["-b", &s.batch.to_string(), "-ub", &s.ubatch.to_string()]);
    command.args(["-ctk", s.kv_type_k.name(), "-ctv", s.kv_type_v.name()]);
    command.args(["-fa", if s.flash_attention.runs() { "on" } else { "off" }]);
    if s.swa_full {
        command.arg("--swa-full");
    }
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
