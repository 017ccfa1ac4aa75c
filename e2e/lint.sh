#!/usr/bin/env bash
# Every check that runs no test. Stops at the first that fails. That generated files are
# current is a test of llama-crds; the chart is checked with the tests, which have Helm.
set -euo pipefail
cd "$(dirname "$0")/.."

check() { # name command…
    local name=$1 start=$SECONDS
    shift
    printf 'lint: %s\n' "$name"
    "$@"
    printf 'lint: %s ok (%s s)\n' "$name" "$((SECONDS - start))"
}

shell_scripts() { git ls-files -z -- '*.sh' '.ci/run' | xargs -0 shellcheck; }

documentation() { RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items; }

check formatting cargo fmt --all --check
check "dependency download" cargo fetch --quiet --locked
check "dependency rules" cargo deny --log-level error --offline check licenses bans sources
check "shell scripts" shell_scripts
check clippy cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
check documentation documentation
