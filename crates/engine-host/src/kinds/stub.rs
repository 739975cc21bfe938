//! The stub engine.

use bytesize::ByteSize;
use pool_domain::Failure;
use pool_domain::plan::EngineMemory;
use pool_services::ports::PrepareRequest;

use crate::kinds::{has_flag, utf8};

/// Flags that decide what is served where; they are the daemon's.
pub(crate) const OWNED: &[&str] = &["--host", "--port", "--model", "--alias", "--api-key", "--api-key-file"];

pub(crate) fn args(request: &PrepareRequest, leading: &[String]) -> Result<Vec<String>, Failure> {
    let spec = &request.spec;
    let model = match &request.model.local_path {
        Some(path) => utf8(path.as_os_str(), "the model's path")?,
        None => format!("stub:{}", request.model.id),
    };
    let mut args = leading.to_vec();
    args.extend(["--model".into(), model, "--alias".into(), request.model.id.clone()]);
    args.extend(["--host".into(), request.listen.ip().to_string()]);
    args.extend(["--port".into(), request.listen.port().to_string()]);
    // The contract lets a pool give these itself, to lie about them.
    if !has_flag(&spec.args, "--slots") {
        args.extend(["--slots".into(), spec.slots.to_string()]);
    }
    if let Some(context) = spec.context.filter(|_| !has_flag(&spec.args, "--ctx-size")) {
        args.extend(["--ctx-size".into(), context.to_string()]);
    }
    args.extend(spec.args.iter().cloned());
    Ok(args)
}

/// It claims what `--vram` says and nothing without it.
pub(crate) fn memory(args: &[String]) -> EngineMemory {
    let mut args = args.iter().map(String::as_str);
    while let Some(arg) = args.next() {
        let size = match arg.split_once('=') {
            Some(("--vram", size)) => Some(size),
            None if arg == "--vram" => args.next(),
            _ => continue,
        };
        // What is no size the stub itself refuses.
        return size
            .and_then(|s| s.parse::<ByteSize>().ok())
            .map_or(EngineMemory::Unknown, |s| EngineMemory::Fixed(s.as_u64()));
    }
    EngineMemory::Fixed(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_what_it_is_told_to() {
        let of = |args: &[&str]| memory(&args.iter().map(|&a| a.to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["--load-ms", "5"]), EngineMemory::Fixed(0));
        assert_eq!(of(&["--vram", "3 GiB"]), EngineMemory::Fixed(3 << 30));
        assert_eq!(of(&["--slots", "2", "--vram=1MiB"]), EngineMemory::Fixed(1 << 20));
        assert_eq!(of(&["--vram", "much"]), EngineMemory::Unknown);
    }
}
