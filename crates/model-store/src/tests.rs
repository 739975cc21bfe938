use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

use super::*;

const GGUF: &[u8] = b"GGUF\x03\0\0\0rest";

struct Bench {
    dir: TempDir,
    models: LocalModels,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let models = LocalModels::new(vec![dir.path().join("missing root"), dir.path().join("root")]);
        Self { dir, models }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> ModelRef {
        fs::write(self.path(name), bytes).unwrap();
        self.model(name)
    }

    fn model(&self, name: &str) -> ModelRef {
        ModelRef::file(self.path(name).to_str().unwrap().to_owned())
    }

    #[track_caller]
    fn refused(&self, model: &ModelRef, because: &str) {
        let failure = self.models.validate_ref(model).unwrap_err();
        assert_eq!(failure.class, FailureClass::Artifact);
        assert!(failure.detail.contains(because), "{}", failure.detail);
        assert!(!failure.detail.contains(self.dir.path().to_str().unwrap()), "no paths: {}", failure.detail);
    }
}

fn untold() -> StagingTold {
    tokio::sync::watch::channel(None).0
}

#[tokio::test]
async fn names_need_no_file() {
    let models = LocalModels::new(Vec::new());
    for text in ["stub:tiny", "name:tiny"] {
        let model = models.ensure_present(&text.parse().unwrap(), &untold()).await.unwrap();
        assert_eq!(model, ResolvedModel { id: "tiny".into(), local_path: None, bytes: 0 });
    }
}

#[tokio::test]
async fn a_good_file_is_resolved_to_where_it_really_lies() {
    let b = Bench::new();
    let model = b.write("root/a.gguf", GGUF);
    let real = fs::canonicalize(b.path("root/a.gguf")).unwrap();
    let found = b.models.ensure_present(&model, &untold()).await.unwrap();
    assert_eq!(found, ResolvedModel { id: "a".into(), local_path: Some(real.clone()), bytes: GGUF.len() as u64 });
    symlink(&real, b.path("root/link.gguf")).unwrap();
    let found = b.models.ensure_present(&b.model("root/link.gguf"), &untold()).await.unwrap();
    assert_eq!(found.local_path, Some(real));
    assert_eq!(found.id, "link");
    b.models.validate_ref(&b.write("root/weights.bin", b"anything")).unwrap();
}

#[test]
fn nothing_outside_the_roots_is_used_nor_told_about() {
    let b = Bench::new();
    let outside = b.write("a.gguf", GGUF);
    b.refused(&outside, "outside of the folders");
    b.refused(&b.model("nothing.gguf"), "outside of the folders");
    b.refused(&b.model("root/../a.gguf"), "outside of the folders");
    b.refused(&b.model("root/../nothing.gguf"), "outside of the folders");
    symlink(b.path("a.gguf"), b.path("root/escape.gguf")).unwrap();
    b.refused(&b.model("root/escape.gguf"), "outside of the folders");
    symlink(b.dir.path(), b.path("root/up")).unwrap();
    b.refused(&b.model("root/up/a.gguf"), "outside of the folders");
    fs::create_dir(b.path("root2")).unwrap();
    b.refused(&b.write("root2/a.gguf", GGUF), "outside of the folders");
    let nothing_allowed = LocalModels::new(Vec::new()).validate_ref(&outside).unwrap_err();
    assert!(nothing_allowed.detail.contains("`[models] roots`"), "{nothing_allowed}");
}

#[test]
fn only_a_regular_file_with_something_in_it_is_a_model() {
    let b = Bench::new();
    b.refused(&b.model("root/none.gguf"), "`none.gguf` does not exist");
    b.refused(&b.model("root"), "is a directory");
    let _socket = UnixListener::bind(b.path("root/s.gguf")).unwrap();
    b.refused(&b.model("root/s.gguf"), "is a socket");
    b.refused(&b.write("root/empty.gguf", b""), "is empty");
    let device = LocalModels::new(vec!["/dev".into()]);
    let failure = device.validate_ref(&ModelRef::file("/dev/null")).unwrap_err();
    assert!(failure.detail.contains("`null` is a device"), "{failure}");
    symlink(b.path("root/loop.gguf"), b.path("root/loop.gguf")).unwrap();
    b.refused(&b.model("root/loop.gguf"), "cannot be read");
}

#[test]
fn a_folder_with_a_config_and_weights_is_a_model() {
    let b = Bench::new();
    fs::create_dir(b.path("root/m")).unwrap();
    b.refused(&b.model("root/m"), "without a config.json");
    b.write("root/m/config.json", b"{}");
    b.refused(&b.model("root/m"), "without safetensors");
    b.write("root/m/a.safetensors", b"12345");
    b.write("root/m/b.safetensors", b"678");
    let found = b.models.resolve(&b.model("root/m")).unwrap();
    assert_eq!((found.id.as_str(), found.bytes), ("m", 8));
    // Weights may lie elsewhere below a root, as in a cache, but nowhere else.
    b.write("outside.safetensors", b"x");
    symlink(b.path("outside.safetensors"), b.path("root/m/c.safetensors")).unwrap();
    b.refused(&b.model("root/m"), "outside of the folders");
}

#[tokio::test]
async fn a_fifo_is_refused_without_waiting_for_a_writer() {
    let b = Bench::new();
    mknodat(CWD, b.path("root/pipe.gguf"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    b.refused(&b.model("root/pipe.gguf"), "is a FIFO");
    assert!(b.models.ensure_present(&b.model("root/pipe.gguf"), &untold()).await.is_err());
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    let b = Bench::new();
    let model = b.write("root/a.gguf", GGUF);
    fs::set_permissions(b.path("root/a.gguf"), fs::Permissions::from_mode(0o000)).unwrap();
    if File::open(b.path("root/a.gguf")).is_err() {
        b.refused(&model, "may not be read");
    }
}

#[test]
fn the_first_bytes_must_be_those_of_gguf() {
    let b = Bench::new();
    for bad in [&b"GG"[..], b"GGUF\x03", b"<!DOCTYPE html>", b"version https://git-lfs"] {
        b.refused(&b.write("root/bad.gguf", bad), "is not a GGUF file");
    }
    b.refused(&b.write("root/BAD.GGUF", b"<!DOCTYPE html>"), "is not a GGUF file");
    for bad in [&b"GGUF\x01\0\0\0"[..], b"GGUF\x04\0\0\0", b"GGUF\0\0\0\x03"] {
        b.refused(&b.write("root/bad.gguf", bad), "is GGUF of version");
    }
    b.models.validate_ref(&b.write("root/two.gguf", b"GGUF\x02\0\0\0")).unwrap();
}
