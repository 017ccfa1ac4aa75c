#!/usr/bin/env bash
# Compiles, checks and links the worker with CUDA and NCCL on a machine without a GPU,
# and runs as much of it as needs none: its start, and NCCL's collectives between rank
# processes on test doubles of the driver and of NCCL. Kernels are compiled, not run.
#
# The first run compiles candle's kernels: some eleven minutes on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

TARGET=${CARGO_TARGET_DIR:-target}/cuda
SUMMARY=${LLAMA_TEST_SUMMARY:-$TARGET/summary.txt}
# What a build takes, next to the toolkit in the cache.
NEEDED_GB=8
FEATURES=cuda,nccl
# EX_USAGE, the exit code of a wrong configuration.
CONFIGURATION=64
# As it stands in a line of the log, which is JSON.
MISSING='no CUDA device: the driver libcuda.so.1 says \"no CUDA-capable device is detected\"; run on a node with a GPU, or use --device=cpu'

fail() {
    printf 'check-cuda: %s\n' "$*" >&2
    exit 1
}

step() { # words command…
    local words=$1 start=$SECONDS
    shift
    printf 'check-cuda: %s\n' "$words"
    "$@"
    printf 'check-cuda: %s ok (%s s)\n' "$words" "$((SECONDS - start))"
}

worker() { cargo "$1" --quiet --locked --target-dir "$TARGET" -p llama-worker --features "$FEATURES" "${@:2}"; }

# As the test wants it, which brings the worker too: with its own dependencies alone cargo
# would settle on other features, and compile candle's kernels once more for the test.
compile() { worker test --test nccl --no-run; }

clippy() { worker clippy -p llama-model --all-targets -- -D warnings; }

# Starts the worker where the driver library reports no device.
start_without_device() {
    local output status=0
    output=$(LD_LIBRARY_PATH=$CUDA_HOME/lib/stubs:$CUDA_HOME/lib "$TARGET/debug/llama-worker" serve \
        --device=cuda --model=/none --served-name=none --termination-log="$TARGET/termination-log" 2>&1) ||
        status=$?
    [ "$status" -eq "$CONFIGURATION" ] || fail "the worker ended with $status, expected $CONFIGURATION: $output"
    # The report, and where none was written of it outside of a pod.
    output=$(grep -v 'no termination message written' <<<"$output")
    [ "$(wc -l <<<"$output")" -eq 1 ] || fail "the worker said more than one line: $output"
    case $output in
    *"$MISSING"*) printf '  %s\n' "$MISSING" ;;
    *) fail "the worker said \"$output\", expected \"$MISSING\"" ;;
    esac
}

# Without any driver library it is the loader that speaks.
start_without_driver() {
    local output
    output=$(LD_LIBRARY_PATH=$CUDA_HOME/lib "$TARGET/debug/llama-worker" --version 2>&1) &&
        { printf '  this machine has a driver library of its own\n'; return; }
    case $output in
    *libcuda.so.1*) printf '  %s\n' "$output" ;;
    *) fail "the loader does not name the driver: $output" ;;
    esac
}

collectives() {
    local program
    program=$(worker test --test nccl --no-run --message-format=json |
        sed -n 's/.*"name":"nccl".*"executable":"\([^"]*\)".*/\1/p')
    [ -n "$program" ] || fail "cargo does not say where the test of NCCL is"
    e2e/cuda/double/build.sh "$program" "$TARGET/double"
    LLAMA_TEST_CUDA_DOUBLE=1 LD_LIBRARY_PATH=$TARGET/double:$CUDA_HOME/lib \
        timeout 300 "$program" --test-threads 1 --quiet
}

mkdir -p "$TARGET"
free=$(($(df --output=avail -k "$TARGET" | tail -1) / 1024 / 1024))
[ -e "$TARGET/debug/llama-worker" ] || [ "$free" -ge "$NEEDED_GB" ] ||
    fail "$free GB are free under $TARGET, a CUDA build needs $NEEDED_GB"

environment=$(e2e/cuda/toolkit.sh)
eval "$environment"
step "compile and link with CUDA ${CUDARC_CUDA_VERSION:0:2} and NCCL for compute capability $CUDA_COMPUTE_CAP" compile
step clippy clippy
step "start without a device" start_without_device
step "start without a driver" start_without_driver
step "NCCL's collectives between processes, on test doubles" collectives
printf 'ran      worker with CUDA and NCCL: compiled, linked, started, collectives on test doubles; no kernel was run\n' |
    tee -a "$SUMMARY"
