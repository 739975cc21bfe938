//! What an engine's last words say about why it ended.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass};

use crate::text::tidy;

/// Bytes of the log that count.
const TAIL: u64 = 64 * 1024;

/// A text in the log, in lower case, and the class it means. The first that is found decides.
type Pattern = (&'static str, FailureClass);

const LLAMA_CPP: &[Pattern] = &[
    ("cudamalloc failed: out of memory", FailureClass::VramOom),
    ("cuda out of memory", FailureClass::VramOom),
    ("cuda error: out of memory", FailureClass::VramOom),
    ("couldn't bind", FailureClass::PortConflict),
    ("address already in use", FailureClass::PortConflict),
    ("cuda error", FailureClass::DriverError),
    ("cuda driver version is insufficient", FailureClass::DriverError),
    ("invalid magic character", FailureClass::Artifact),
    ("unknown model architecture", FailureClass::Artifact),
    ("gguf_init_from_reader: failed to read", FailureClass::Artifact),
    ("model is corrupted or incomplete", FailureClass::Artifact),
    ("error: invalid argument", FailureClass::Config),
];

const STUB: &[Pattern] = &[
    ("cuda out of memory", FailureClass::VramOom),
    ("address already in use", FailureClass::PortConflict),
    ("cuda error", FailureClass::DriverError),
    ("error: unexpected argument", FailureClass::Config),
    ("error: invalid value", FailureClass::Config),
];

/// Why an engine of this kind ended so. A file operation: not for an async thread.
pub(crate) fn classify(kind: &str, log: &Path, exit: Exit) -> Failure {
    explain(kind, &tail(log), exit)
}

fn explain(kind: &str, log: &str, exit: Exit) -> Failure {
    let patterns = if kind == "stub" { STUB } else { LLAMA_CPP };
    let lower = log.to_lowercase();
    for (text, class) in patterns {
        if let Some(line) = lower.lines().position(|line| line.contains(text)).and_then(|at| log.lines().nth(at)) {
            return Failure::new(class.clone(), format!("{exit}: {}", tidy(line)));
        }
    }
    let crash = Failure::crash(exit);
    match log.lines().rev().map(tidy).find(|line| line.chars().any(char::is_alphanumeric)) {
        Some(line) => Failure { detail: format!("{}; last in its log: {line}", crash.detail), ..crash },
        None => crash,
    }
}

fn tail(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_decides_the_class() {
        let class = |log: &str| explain("llama.cpp", log, Exit::Code(1)).class;
        let oom = "load\nggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory\nexiting";
        assert_eq!(class(oom), FailureClass::VramOom);
        assert_eq!(class("start: couldn't bind HTTP server socket, hostname: 127.0.0.1"), FailureClass::PortConflict);
        assert_eq!(class("CUDA error: unspecified launch failure"), FailureClass::DriverError);
        // Words of llama.cpp's server (build 8, commit e1bb79b), for a file cut in its header and one cut in its data.
        let header = "E gguf_init_from_reader: number of tensors is 2334397804759248750 but must be in [0, 53624256028225440]\n\
            E gguf_init_from_reader: failed to read header\nE llama_model_load: error loading model";
        let data = "E llama_model_load: error loading model: tensor 'token_embd.weight' data is not within the file bounds, \
            model is corrupted or incomplete\nE srv    load_model: failed to load model";
        assert_eq!((class(header), class(data)), (FailureClass::Artifact, FailureClass::Artifact));
        assert_eq!(class("all fine"), FailureClass::Crash(Exit::Code(1)));
    }

    #[test]
    fn a_crash_tells_the_last_line_that_says_something() {
        let failure = explain("stub", "one\nfailed to read '/srv/models/a.gguf'\n----\n\n", Exit::Signal(11));
        assert_eq!(failure.class, FailureClass::Crash(Exit::Signal(11)));
        assert_eq!(failure.detail, "the engine ended with signal 11; last in its log: failed to read 'a.gguf'");
        assert_eq!(explain("stub", "", Exit::Code(0)).detail, "the engine ended with exit status 0");
    }
}
