//! `llama-server`.

use pool_domain::Failure;
use pool_domain::estimate::{FlashAttention, KvType, LlamaCppSettings, Outputs};
use pool_domain::plan::EngineMemory;
use pool_services::ports::PrepareRequest;
use pool_services::{PoolSpec, Workload};

use crate::discover::Program;
use crate::kinds::{has_flag, utf8};
use crate::text::config;

/// Flags that decide what is served where; they are the daemon's.
pub(crate) const OWNED: &[&str] = &[
    "--host",
    "--port",
    "--model",
    "-m",
    "--alias",
    "-a",
    "--api-key",
    "--api-key-file",
    "--model-url",
    "-mu",
    "--hf-repo",
    "-hf",
    "-hfr",
    "--hf-file",
    "-hff",
    "--docker-repo",
    "-dr",
    // A secret in an argument is everybody's.
    "--hf-token",
    "-hft",
    "--models-dir",
    // Keys of a pool: `context`, `slots`, `kv_type`, `tensor_split`.
    "--ctx-size",
    "-c",
    "--parallel",
    "-np",
    "--cache-type-k",
    "-ctk",
    "--cache-type-v",
    "-ctv",
    "--tensor-split",
    "-ts",
    // Given as `--fit off`: the plan is ours.
    "--fit",
    "-fit",
];

/// Flags that take or move memory in ways that no formula here follows: the pool has to say how much (`vram`).
const UNCOUNTED: &[&str] = &[
    "--model-draft",
    "-md",
    "--spec-draft-model",
    "--hf-repo-draft",
    "-hfd",
    "--mmproj",
    "-mm",
    "--mmproj-url",
    "-mmu",
    "--lora",
    "--lora-scaled",
    "--control-vector",
    "--control-vector-scaled",
    "--device",
    "-dev",
    "--main-gpu",
    "-mg",
    "--split-mode",
    "-sm",
    "--override-tensor",
    "-ot",
    "--cpu-moe",
    "-cmoe",
    "--n-cpu-moe",
    "-ncmoe",
    "--model-vocoder",
    "-mv",
];

/// Everything, on any model.
const ALL_LAYERS: &str = "999";

pub(crate) fn args(request: &PrepareRequest, program: &Program) -> Result<Vec<String>, Failure> {
    let spec = &request.spec;
    let Some(path) = &request.model.local_path else {
        return Err(config("llama.cpp serves model files, and this model is none"));
    };
    let mut args: Vec<String> = vec![
        "--model".into(),
        utf8(path.as_os_str(), "the model's path")?,
        "--alias".into(),
        request.model.id.clone(),
        "--host".into(),
        request.listen.ip().to_string(),
        "--port".into(),
        request.listen.port().to_string(),
        "--parallel".into(),
        spec.slots.to_string(),
    ];
    if let Some(context) = request.context.or(spec.context.map(u64::from)) {
        args.extend(["--ctx-size".into(), context.to_string()]);
    }
    if !request.devices.uuids.is_empty() {
        args.extend(["-ngl".into(), ALL_LAYERS.into()]);
    }
    if let Some(split) = &request.tensor_split {
        args.extend(["--tensor-split".into(), split.clone()]);
    }
    for (flag, kv) in [("--cache-type-k", spec.kv_type.0), ("--cache-type-v", spec.kv_type.1)] {
        if kv != KvType::default() {
            args.extend([flag.into(), kv.to_string()]);
        }
    }
    if program.knows("--fit") {
        // The plan is ours: newer versions would shrink the context by themselves.
        args.extend(["--fit".into(), "off".into()]);
    }
    match spec.workload {
        Workload::Generate => {}
        Workload::Embed => args.push("--embeddings".into()),
        Workload::Rerank => args.push("--reranking".into()),
    }
    let ui = ["--no-ui", "--no-webui"].into_iter().find(|flag| program.knows(flag));
    let optional = ["--metrics", "--slots"].into_iter().filter(|flag| program.knows(flag)).chain(ui);
    args.extend(optional.map(str::to_owned));
    args.extend(spec.args.iter().cloned());
    Ok(args)
}

/// How its memory is known.
pub(crate) fn memory(spec: &PoolSpec) -> EngineMemory {
    if UNCOUNTED.iter().any(|flag| has_flag(&spec.args, flag)) {
        return EngineMemory::Unknown;
    }
    EngineMemory::LlamaCpp(settings(spec))
}

/// What decides about memory: the keys of the pool, and the flags that have no key.
fn settings(spec: &PoolSpec) -> LlamaCppSettings {
    let default = LlamaCppSettings::default();
    let (mut flash_attention, mut batch, mut ubatch, mut gpu_layers) =
        (default.flash_attention, default.batch, default.ubatch, default.gpu_layers);
    let (mut swa_full, mut kv_unified, mut kv_offload) = (false, false, true);
    let mut args = spec.args.iter().map(String::as_str);
    while let Some(arg) = args.next() {
        let (flag, given) = arg.split_once('=').map_or((arg, None), |(flag, value)| (flag, Some(value)));
        let mut number = |old: u32| given.or_else(|| args.next()).and_then(|n| n.parse().ok()).unwrap_or(old);
        match flag {
            "--batch-size" | "-b" => batch = number(batch),
            "--ubatch-size" | "-ub" => ubatch = number(ubatch),
            "--n-gpu-layers" | "--gpu-layers" | "-ngl" => gpu_layers = Some(number(u32::MAX)),
            "--swa-full" => swa_full = true,
            "--kv-unified" | "-kvu" => kv_unified = true,
            "--no-kv-offload" | "-nkvo" => kv_offload = false,
            "--flash-attn" | "-fa" => {
                flash_attention = match given.or_else(|| args.next()) {
                    Some("off" | "0" | "false" | "disabled") => FlashAttention::Off,
                    Some("auto" | "-1") => FlashAttention::Auto,
                    _ => FlashAttention::On,
                }
            }
            _ => {}
        }
    }
    LlamaCppSettings {
        context: spec.context.map_or(0, u64::from),
        slots: u32::from(spec.slots),
        kv_type_k: spec.kv_type.0,
        kv_type_v: spec.kv_type.1,
        flash_attention,
        batch,
        ubatch,
        kv_unified,
        gpu_layers,
        swa_full,
        kv_offload,
        outputs: if spec.workload == Workload::Generate { Outputs::Slots } else { Outputs::Batch },
    }
}
