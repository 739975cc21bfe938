#!/bin/sh
# Runs one fuzz target for so many seconds: fuzz/run.sh masks 60
# These are cargo-fuzz's flags; they need a nightly compiler and a C++ compiler.
set -eu
target=$1
seconds=${2:-60}
cd "$(dirname "$0")"
host=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p "corpus/$target" "artifacts/$target"
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Zsanitizer=address" \
  cargo +nightly build --release --target "$host" --bin "$target"
exec "${CARGO_TARGET_DIR:-target}/$host/release/$target" -max_total_time="$seconds" -rss_limit_mb=512 \
  -artifact_prefix="artifacts/$target/" "corpus/$target"
