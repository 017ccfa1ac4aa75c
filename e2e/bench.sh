#!/usr/bin/env bash
# Measurements that compare the worker with a peer in the same run, as JSON. They
# decide no test: what they say depends on the machine and on what else it does.
#
#   bench.sh perplexity MODEL TEXT CHUNKS   ours and llama.cpp's of the same windows
#   bench.sh load REPEATS                   loading from a cold page cache, and dd
#   bench.sh prefix MODEL TRACE REQUESTS    a trace with and without prefix caching
#   bench.sh memory MODEL TOKENS            the memory plan and the memory taken
#   bench.sh serve MODEL TRACE              a trace against this worker and its peers
#   bench.sh operator                       many deployments on an API server of its own
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
TARGET=${CARGO_TARGET_DIR:-target}
THREADS=${THREADS:-$(nproc)}
SHAPE=inference-worker/model/examples/shape-1b
# Tokens of the longest sequence of the 1B shape: computing more takes minutes.
SHAPE_TOKENS=512
# Of the server that answers a trace.
API_PORT=${API_PORT:-18000}
# Tokens of a sequence, to which the lengths of a trace are scaled.
CONTEXT=${CONTEXT:-2048}
# Memory of a server, as a pod would have it: what is left of it keeps prompts.
MEMORY=${MEMORY:-8589934592}
MISTRALRS=mistralrs==0.9.5
CONCURRENCY=${CONCURRENCY:-16}

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

# Serves MODEL on ports of its own and replays the trace against it.
replay() { # model trace requests flag…
    local model=$1 trace=$2 requests=$3 worker=$TARGET/release/llama-worker server status=0
    shift 3
    "$worker" serve --model "$model" --served-name bench --max-tokens "$CONTEXT" \
        --threads-per-rank "$THREADS" --max-waiting 1000 --memory-limit-bytes "$MEMORY" --bind 127.0.0.1 \
        --api-port "$API_PORT" --internal-port "$((API_PORT + 1))" "$@" >/dev/null 2>&1 &
    server=$!
    # shellcheck disable=SC2064 # the process of now
    trap "kill $server 2>/dev/null || true" EXIT
    for _ in $(seq 100); do
        curl -sf "http://127.0.0.1:$API_PORT/health" >/dev/null && break
        sleep 0.2
    done
    "$worker" replay --endpoint "http://127.0.0.1:$API_PORT" --model bench --trace "$trace" \
        --requests "$requests" --context "$CONTEXT" --concurrency "$CONCURRENCY" || status=$?
    kill "$server"
    wait "$server" || true
    return "$status"
}

prefix() { # model trace requests
    local with without
    [ -f "$2" ] || fail "TRACE names no file: $2; docs/benchmarks.md says where to get one"
    cargo build --quiet --release --locked -p llama-worker
    say "$3 requests with prefix caching"
    with=$(replay "$1" "$2" "$3")
    say "$3 requests without"
    without=$(replay "$1" "$2" "$3" --no-prefix-caching)
    printf '{"with":%s,"without":%s}\n' "$with" "$without" |
        python3 -c 'import json, sys
both = json.load(sys.stdin)
both["ratio"] = both["with"]["tokens_per_second"] / both["without"]["tokens_per_second"]
print(json.dumps(both))'
}

# mistral.rs out of its wheel; says nothing where it cannot be had, which the report names.
mistralrs() {
    local folder=$CACHE/mistralrs
    if [ "$(cat "$folder/installed" 2>/dev/null)" != "$MISTRALRS" ]; then
        say "installing $MISTRALRS"
        rm -rf "$folder"
        python3 -m venv "$folder"
        "$folder/bin/pip" install -q "$MISTRALRS" >&2 || return 0
        printf '%s\n' "$MISTRALRS" >"$folder/installed"
    fi
    printf '%s' "$folder/bin/python"
}

serve() { # model trace
    local folder peer
    [ -f "$2" ] || fail "TRACE names no file: $2; docs/benchmarks.md says where to get one"
    folder=$(e2e/llama-cpp.sh)
    peer=$(mistralrs)
    cargo build --quiet --release --locked -p llama-worker
    # This script means other things by these names.
    THREADS=${SERVE_THREADS:-1 2} CONTEXT=${SERVE_CONTEXT:-512} python3 e2e/bench_serve.py "$TARGET/release/llama-worker" "$1" "$2" \
        "$folder/llama-server" "$peer"
}

operator() {
    local argument more=()
    for argument in ${OPERATOR_ARGUMENTS:-}; do more+=("--operator-argument=$argument"); done
    cargo build --quiet --release --locked -p llama-operator -p llama-bench
    "$TARGET/release/llama-bench" --operator "$TARGET/release/llama-operator" \
        --deployments "${DEPLOYMENTS:-1000}" --namespaces "${NAMESPACES:-1}" \
        --repeats "${REPEATS:-1}" --peer "${PEER:-stateful-set}" "${more[@]}"
}

case ${1:-} in
perplexity) perplexity "$2" "$3" "$4" ;;
load) load "$2" ;;
prefix) prefix "$2" "$3" "$4" ;;
memory) memory "$2" "$3" ;;
serve) serve "$2" "$3" ;;
operator) operator ;;
*) fail "say what: perplexity, load, prefix, memory, serve or operator" ;;
esac
