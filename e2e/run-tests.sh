#!/usr/bin/env bash
# Runs tests and says at the end what ran, and what did not and why.
#
#   run-tests.sh unit         everything that needs no cluster
#   run-tests.sh e2e          the end-to-end tests, on a cluster of their own
#   run-tests.sh unit e2e     both
#   run-tests.sh long         those where time matters, longer
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${LLAMA_CACHE:?say where the cache is}
TARGET=${CARGO_TARGET_DIR:-target}
LLAMA_CLUSTER=$TARGET/release/llama-cluster
IMAGES=$TARGET/images
NAME=llama-e2e
# What ran and what did not is told here too; the caller of several runs gives one file.
SUMMARY=${LLAMA_TEST_SUMMARY:-$TARGET/test-summary.txt}
END_TO_END='package(llama-e2e) and kind(test)'
# Those for which it gets several nodes, and how many.
SEVERAL='binary(several)'
NODES=3
# Which of the others run.
CHOSEN='all()'

note() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }

# What the cluster needs that this machine may not have.
why_no_cluster() {
    if [ -n "${LLAMA_CLUSTER_KUBECONFIG:-}" ]; then return; fi
    if docker info >/dev/null 2>&1; then return; fi
    [ "$(uname -s)" = Linux ] || { echo "no Docker engine answers and this is not Linux"; return; }
    [ "$(id -u)" -eq 0 ] || echo "no Docker engine answers and this is not root"
}

# The programs of a control plane, for tests against the real API server.
components() {
    if [ -n "$(why_no_cluster)" ]; then return; fi
    e2e/build.sh
    LLAMA_COMPONENTS_DIR=$("$LLAMA_CLUSTER" build ${LLAMA_TEST_KUEUE:+--with-kueue})
    export LLAMA_COMPONENTS_DIR
}

unit() {
    components
    e2e/fetch-model.sh "$LLAMA_TEST_MODEL"
    e2e/fetch-tokenizers.sh "$LLAMA_TEST_TOKENIZERS"
    e2e/fetch-embedding-model.sh "$LLAMA_TEST_EMBEDDING_MODEL"
    cargo nextest run --locked --workspace -E "not ($END_TO_END)"
    note "ran      unit, property, golden and real-model tests"
    if [ -n "${LLAMA_COMPONENTS_DIR:-}" ]; then
        note "ran      operator against a real API server"
        if [ -x "$LLAMA_COMPONENTS_DIR/kueue" ]; then
            note "ran      groups in queues of the real Kueue"
        else
            note "skipped  groups in queues of the real Kueue: LLAMA_TEST_KUEUE=1 builds it"
        fi
        HELM=$LLAMA_COMPONENTS_DIR/helm charts/llama-operator/check.sh
        note "ran      chart: lint, rendering, refusal of wrong values"
    else
        note "skipped  operator against a real API server, chart: $(why_no_cluster)"
    fi
}

end_to_end() {
    local reason
    reason=$(why_no_cluster)
    if [ -n "$reason" ]; then
        note "skipped  end-to-end tests: $reason"
        return
    fi
    e2e/images.sh
    trap '"$LLAMA_CLUSTER" --name "$NAME" down' EXIT
    "$LLAMA_CLUSTER" --name "$NAME" up
    load_images operator worker smollm2-135m-instruct
    [ -x "$CACHE/openai/bin/python" ] || {
        rm -rf "$CACHE/openai"
        python3 -m venv "$CACHE/openai"
        "$CACHE/openai/bin/pip" install -q openai==3.54.0
    }
    LLAMA_E2E_CLUSTER=$NAME LLAMA_E2E_OPENAI_PYTHON=$CACHE/openai/bin/python \
        cargo nextest run --locked --workspace "$@" -E "$END_TO_END and $CHOSEN and not $SEVERAL"
    note "ran      end-to-end tests on a cluster of their own"
    if [ -n "${LLAMA_CLUSTER_KUBECONFIG:-}" ]; then
        note "skipped  end-to-end tests of several nodes: they are for a cluster of their own"
        return
    fi
    # One after the other: the machine has to do with one cluster at a time.
    "$LLAMA_CLUSTER" --name "$NAME" down
    "$LLAMA_CLUSTER" --name "$NAME" up --nodes "$NODES"
    load_images operator worker
    LLAMA_E2E_CLUSTER=$NAME cargo nextest run --locked --workspace "$@" \
        -E "$END_TO_END and $SEVERAL"
    note "ran      end-to-end tests on $NODES nodes"
}

load_images() { # name…
    local archives=("${@/#/$IMAGES/}")
    "$LLAMA_CLUSTER" --name "$NAME" load-image "${archives[@]/%/.tar}"
}

long() {
    components
    LLAMA_TEST_TRIES=50 cargo nextest run --locked --workspace --profile long \
        -E 'package(llama-operator) and test(two_groups_that_want_most_gpus)'
    note "ran      50 times two groups that want most GPUs"
    export LLAMA_TEST_REST_SECONDS=600 LLAMA_TEST_ANSWER_TOKENS=2000 LLAMA_TEST_DEPLOYMENTS=200
    CHOSEN='(binary(resting) or binary(rollout))'
    end_to_end --profile long
}

mkdir -p "$(dirname "$SUMMARY")"
[ -n "${LLAMA_TEST_SUMMARY:-}" ] || : >"$SUMMARY"
for stage in "$@"; do
    case $stage in
    unit) unit ;;
    e2e) end_to_end ;;
    long) long ;;
    *)
        echo "run-tests.sh: say unit, e2e, both or long" >&2
        exit 1
        ;;
    esac
done
