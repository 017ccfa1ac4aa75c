#!/usr/bin/env bash
# Measurements that compare the worker with a peer in the same run, as JSON. They
# decide no test: what they say depends on the machine and on what else it does.
#
#   bench.sh perplexity MODEL TEXT CHUNKS   ours and llama.cpp's of the same windows
#   bench.sh load REPEATS                   loading from a cold page cache, and dd
#   bench.sh memory MODEL TOKENS            the memory plan and the memory taken
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
TARGET=${CARGO_TARGET_DIR:-target}
THREADS=${THREADS:-$(nproc)}
SHAPE=inference-worker/model/examples/shape-1b
# Tokens of the longest sequence of the 1B shape: computing more takes minutes.
SHAPE_TOKENS=512

fail() {
    printf 'bench: %s\n' "$*" >&2
    exit 1
}

say() { printf '  bench: %s\n' "$*" >&2; }

build() {
    local name examples=()
    for name in "$@"; do examples+=(--example "$name"); done
    cargo build --quiet --release --locked -p llama-model "${examples[@]}"
}

perplexity() { # model text chunks
    local model=$1 text=$2 chunks=$3 folder ours own log theirs
    [ -f "$text" ] || fail "TEXT names no file: $text; docs/benchmarks.md says where to get one"
    folder=$(e2e/llama-cpp.sh)
    build perplexity
    say "this worker, $chunks windows"
    ours=$("$TARGET/release/examples/perplexity" "$model" "$text" --chunks "$chunks" --threads "$THREADS")
    own=$(sed -n 's/.*"perplexity":\([0-9.]*\).*/\1/p' <<<"$ours")
    say "llama.cpp, $chunks windows"
    log=$("$folder/llama-perplexity" -m "$model" -f "$text" --chunks "$chunks" -c 512 -t "$THREADS" 2>&1) ||
        fail "llama-perplexity: $(tail -1 <<<"$log")"
    theirs=$(sed -n 's/.*Final estimate: PPL = \([0-9.]*\) .*/\1/p' <<<"$log")
    [ -n "$theirs" ] || fail "llama-perplexity gave no estimate"
    printf '{"ours":%s,"llama_cpp":{"perplexity":%s},"ratio":%s}\n' "$ours" "$theirs" \
        "$(awk -v own="$own" -v theirs="$theirs" 'BEGIN { printf "%.5f", own / theirs }')"
}

load() { # repeats
    local folder
    build write_checkpoint load_speed
    mkdir -p "$CACHE"
    folder=$(mktemp -d "$CACHE/bench-load.XXXXXX")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    say "writing a model of 2.5 GB"
    "$TARGET/release/examples/write_checkpoint" "$SHAPE" "$folder"
    "$TARGET/release/examples/load_speed" "$folder" --repeats "$1" --threads "$THREADS"
}

memory() { # model tokens
    local real shaped
    build memory_use
    say "the real model, $2 tokens"
    real=$("$TARGET/release/examples/memory_use" "$1" --tokens "$2" --threads "$THREADS")
    say "random weights in the shape of 1B, $SHAPE_TOKENS tokens"
    shaped=$("$TARGET/release/examples/memory_use" "$SHAPE" --dummy 1 --tokens "$SHAPE_TOKENS" \
        --threads "$THREADS")
    printf '[%s,%s]\n' "$real" "$shaped"
}

case ${1:-} in
perplexity) perplexity "$2" "$3" "$4" ;;
load) load "$2" ;;
memory) memory "$2" "$3" ;;
*) fail "say what: perplexity, load or memory" ;;
esac
