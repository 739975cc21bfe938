//! `llama-server`.

use pool_domain::Failure;
use pool_services::Workload;
use pool_services::ports::PrepareRequest;

use crate::discover::Program;
use crate::kinds::utf8;
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
    "--models-dir",
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
    if let Some(context) = spec.context {
        args.extend(["--ctx-size".into(), context.to_string()]);
    }
    if !request.devices.uuids.is_empty() {
        args.extend(["-ngl".into(), ALL_LAYERS.into()]);
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
