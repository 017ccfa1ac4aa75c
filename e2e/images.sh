#!/usr/bin/env bash
# Builds the programs and writes the container images as archives under
# target/images: operator, worker, and the model that the demo serves. `docker load`
# and `llama-cluster load-image` read them.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${LLAMA_CACHE:?say where the cache is}
MODEL=$CACHE/models/SmolLM2-135M-Instruct.Q4_1.gguf
TARGET=${CARGO_TARGET_DIR:-target}
TRIPLE=$(uname -m)-unknown-linux-gnu
RELEASE=$TARGET/release
# Other flags would make cargo build everything again, so these have their own folder.
STATIC=$TARGET/static
IMAGES=$TARGET/images

e2e/fetch-model.sh "$MODEL"
echo "  images: compiling operator, worker and harness" >&2
cargo build --quiet --locked --release -p llama-operator -p llama-worker -p llama-e2e
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --locked --release \
    --target "$TRIPLE" --target-dir "$STATIC" -p llama-model-copy

mkdir -p "$IMAGES"
image() { # name input…
    local name=$1
    shift
    "$RELEASE/llama-cluster" image "deploy/images/$name.yaml" "$@" --output "$IMAGES/$name.tar" >&2
}
image operator --input "llama-operator=$RELEASE/llama-operator"
image worker --input "llama-worker=$RELEASE/llama-worker" \
    --input "llama-model-copy=$STATIC/$TRIPLE/release/llama-model-copy"
image smollm2-135m-instruct --input "model=$MODEL"
