#!/usr/bin/env bash
# Fuzzes each target for a minute, from headers and texts of the test models and from
# what lies in seeds.
#
#   run.sh [SECONDS [TARGET…]]
set -euo pipefail
cd "$(dirname "$0")"

SECONDS_EACH=${1:-60}
TARGETS=(safetensors gguf config tokenizer tools requests events)
[ $# -le 1 ] || TARGETS=("${@:2}")

missing() {
    printf 'fuzz: %s\n' "$*" >&2
    exit 1
}

rustc +nightly --version >/dev/null 2>&1 ||
    missing "there is no nightly Rust; rustup toolchain install nightly --profile minimal"
cargo fuzz --version >/dev/null 2>&1 || missing "there is no cargo-fuzz; cargo install cargo-fuzz"
command -v c++ >/dev/null || missing "there is no C++ compiler, which libFuzzer needs"

cargo run --quiet --manifest-path ../../Cargo.toml -p llama-checkpoint --example fuzz_seeds -- corpus

for target in "${TARGETS[@]}"; do
    printf 'fuzz: %s for %s s\n' "$target" "$SECONDS_EACH"
    mkdir -p "corpus/$target"
    folders=("corpus/$target")
    [ ! -d "seeds/$target" ] || folders+=("seeds/$target")
    cargo +nightly fuzz run --fuzz-dir . "$target" "${folders[@]}" -- -max_total_time="$SECONDS_EACH" \
        -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=512 -max_len=65536 -print_final_stats=1 -verbosity=0
done
