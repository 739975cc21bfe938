//! The stub engine.

use pool_domain::Failure;
use pool_services::ports::PrepareRequest;

use crate::kinds::{has_flag, utf8};

/// Flags that decide what is served where; they are the daemon's.
pub(crate) const OWNED: &[&str] = &["--host", "--port", "--model", "--alias", "--api-key"];

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
