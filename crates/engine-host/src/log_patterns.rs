//! What an engine's last words say about why it ended. The words are data, in `patterns`; samples of real logs are in
//! `tests/logs`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use pool_domain::Failure;
use pool_domain::failure::Exit;

use crate::text::tidy;
pub(crate) use patterns::Pattern;

mod patterns;

/// Bytes of the log that count.
const TAIL: u64 = 64 * 1024;

/// Why an engine of this kind ended so. A file operation: not for an async thread.
pub(crate) fn classify(kind: &str, log: &Path, exit: Exit) -> Failure {
    explain(kind, &tail(log), exit)
}

fn explain(kind: &str, log: &str, exit: Exit) -> Failure {
    let lower = log.to_lowercase();
    for Pattern(texts, class) in patterns::of(kind).iter().copied().flatten() {
        let found = lower.lines().position(|line| texts.iter().all(|text| line.contains(text)));
        if let Some(line) = found.and_then(|at| log.lines().nth(at)) {
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
    use pool_domain::FailureClass;

    use super::*;

    /// `tests/logs/<kind>/<class>.<what>.log`
    #[test]
    fn real_logs_tell_their_class() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/logs");
        let (mut kinds, mut samples) = (0, 0);
        for kind in dir.read_dir().unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
            kinds += 1;
            for log in kind.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
                let name = log.file_name().unwrap().to_str().unwrap();
                let expected = FailureClass::from_code(name.split('.').next().unwrap()).expect(name);
                let failure = classify(kind.file_name().unwrap().to_str().unwrap(), &log, Exit::Code(1));
                assert_eq!(failure.class.code(), expected.code(), "{}: {failure}", log.display());
                samples += 1;
            }
        }
        assert!(kinds == 7 && samples > 40, "{kinds} kinds, {samples} samples");
    }

    #[test]
    fn every_kind_knows_the_common_ends() {
        use FailureClass as C;
        for kind in ["llama.cpp", "vllm", "sglang", "tgi", "tensorrt-llm", "triton", "stub"] {
            let known: Vec<_> = patterns::of(kind).iter().copied().flatten().map(|p| p.1.code()).collect();
            for class in [C::VramOom, C::PortConflict, C::DriverError, C::Config] {
                assert!(known.contains(&class.code()), "{kind}: {class:?}");
            }
            if kind != "stub" {
                assert!(known.contains(&"gpu_lost") && known.contains(&"artifact"), "{kind}");
            }
        }
        let lower = |p: &&Pattern| p.0.iter().all(|text| *text == text.to_lowercase());
        assert!(patterns::ALL.iter().copied().flatten().filter(|p| !lower(p)).count() == 0, "compared in lower case");
    }

    #[test]
    fn a_crash_tells_the_last_line_that_says_something() {
        let failure = explain("stub", "one\nfailed to read '/srv/models/a.gguf'\n----\n\n", Exit::Signal(11));
        assert_eq!(failure.class, FailureClass::Crash(Exit::Signal(11)));
        assert_eq!(failure.detail, "the engine ended with signal 11; last in its log: failed to read 'a.gguf'");
        assert_eq!(explain("stub", "", Exit::Code(0)).detail, "the engine ended with exit status 0");
    }
}
