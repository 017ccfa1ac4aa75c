#!/usr/bin/env bash
# Builds the programs and writes the container images as archives under
# target/images: operator, worker, and the model that the demo serves. `docker load`
# and `llama-cluster load-image` read them.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${LLAMA_CACHE:?say where the cache is}
MODEL=$CACHE/models/SmolLM2-135M-Instruct.Q4_1.gguf
TARGET=${CARGO_TARGET_DIR:-target}
RELEASE=$TARGET/release
STATIC=$TARGET/static/$(uname -m)-unknown-linux-gnu/release
IMAGES=$TARGET/images

e2e/fetch-model.sh "$MODEL"
e2e/build.sh

mkdir -p "$IMAGES"
image() { # name input…
    local name=$1
    shift
    "$RELEASE/llama-cluster" image "deploy/images/$name.yaml" "$@" --output "$IMAGES/$name.tar" >&2
}
image operator --input "llama-operator=$RELEASE/llama-operator"
image worker --input "llama-worker=$RELEASE/llama-worker" \
    --input "llama-model-copy=$STATIC/llama-model-copy" \
    --input "llama-model-fetch=$RELEASE/llama-model-fetch"
image smollm2-135m-instruct --input "model=$MODEL"
