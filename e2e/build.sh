#!/usr/bin/env bash
# Compiles the programs that clusters run, optimized: operator, worker, harness, and
# the static program that goes into model images. Always the same packages together,
# so that cargo settles on one set of features and compiles everything once.
set -euo pipefail
cd "$(dirname "$0")/.."

TARGET=${CARGO_TARGET_DIR:-target}

cargo build --quiet --locked --release -p llama-operator -p llama-worker \
    -p llama-model-fetch -p llama-e2e
# Other flags would make cargo build everything again, so these have their own folder.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --locked --release \
    --target "$(uname -m)-unknown-linux-gnu" --target-dir "$TARGET/static" -p llama-model-copy
