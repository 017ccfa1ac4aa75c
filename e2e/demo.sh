#!/usr/bin/env bash
# The demonstration: a cluster, the operator by Helm, a LlamaDeployment by kubectl,
# and a question to the model, answered as it streams.
#
#   demo.sh up      everything, from compiling to the answer
#   demo.sh down    removes all of it but the build cache
set -euo pipefail
cd "$(dirname "$0")/.."

TARGET=${CARGO_TARGET_DIR:-target}
LLAMA_CLUSTER=$TARGET/release/llama-cluster
IMAGES=$TARGET/images
NAME=llama-demo
NAMESPACE=default
QUESTION="What is the capital of France? Answer in one sentence."
READY_WITHIN=300
LOGS=$TARGET/demo

begun=$SECONDS
report=()

# Runs one phase with its output in a log file, while a line says what happens and
# for how long. A failure shows the end of the log.
phase() { # words command…
    local words=$1 log start=$SECONDS pid status=0
    shift
    log=$LOGS/$((${#report[@]} + 1)).log
    "$@" >"$log" 2>&1 &
    pid=$!
    if [ -t 2 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r\033[K⠿ %s  %d s  \033[2m%s\033[0m' "$words" "$((SECONDS - start))" \
                "$(tail -n 1 "$log" 2>/dev/null | tr -cd '[:print:]' | cut -c1-60)" >&2
            sleep 0.3
        done
        printf '\r\033[K' >&2
    else
        printf '… %s\n' "$words" >&2
    fi
    wait "$pid" || status=$?
    if [ "$status" -ne 0 ]; then
        printf '✗ %s failed after %d s; the end of %s:\n' "$words" "$((SECONDS - start))" "$log" >&2
        tail -n 30 "$log" >&2
        exit 1
    fi
    printf '✓ %s  %d s\n' "$words" "$((SECONDS - start))" >&2
    report+=("$((SECONDS - start)) $words")
}

kubectl() { "$KUBECTL" --kubeconfig "$KUBECONFIG_FILE" --namespace "$NAMESPACE" "$@"; }

field() { "$LLAMA_CLUSTER" --name "$NAME" status --json | sed -n "s/^  \"$1\": \"\(.*\)\",\{0,1\}\$/\1/p"; }

install_operator() {
    "$HELM" --kubeconfig "$KUBECONFIG_FILE" upgrade --install llama-operator charts/llama-operator \
        --namespace llama-system --create-namespace \
        --set image.tag=dev --set workerImage.tag=dev --wait --timeout 3m
}

apply_sample() { kubectl apply -f deploy/samples/smollm2.yaml; }

# Waits until the LlamaDeployment is Ready, and says what it is waiting for.
wait_until_ready() {
    local deadline=$((SECONDS + READY_WITHIN)) said="" line
    while [ "$SECONDS" -lt "$deadline" ]; do
        line=$(kubectl get ld smollm2 -o \
            'jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.reason}: {.message}{end}')
        [ "$line" = "$said" ] || echo "${line:-no status yet}"
        said=$line
        case $line in True*) return ;; esac
        sleep 0.5
    done
    kubectl describe ld smollm2
    kubectl get pods -o wide
    return 1
}

# Asks through the Service, over a port that kubectl forwards.
ask() {
    local log=$LOGS/port-forward.log port deadline=$((SECONDS + 20))
    kubectl port-forward --address 127.0.0.1 service/smollm2 :8000 >"$log" 2>&1 &
    forward=$!
    trap 'kill "$forward" 2>/dev/null || true' EXIT
    until port=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$log") && [ -n "$port" ]; do
        [ "$SECONDS" -lt "$deadline" ] || { cat "$log" >&2; return 1; }
        sleep 0.1
    done
    printf '\n> %s\n\n' "$QUESTION"
    python3 e2e/clients/ask.py "http://127.0.0.1:$port/v1" smollm2 "$QUESTION"
}

up() {
    mkdir -p "$LOGS"
    phase "Compile operator, worker and harness" e2e/build.sh
    phase "Fetch the model and write images" e2e/images.sh
    phase "Build Kubernetes, etcd, CoreDNS and Helm (once)" "$LLAMA_CLUSTER" build
    phase "Start the cluster" "$LLAMA_CLUSTER" --name "$NAME" up
    KUBECONFIG_FILE=$(field kubeconfig) KUBECTL=$(field kubectl) HELM=$(field helm)
    phase "Load the images" "$LLAMA_CLUSTER" --name "$NAME" load-image "$IMAGES"/{operator,worker,smollm2-135m-instruct}.tar
    phase "helm install llama-operator" install_operator
    phase "kubectl apply -f deploy/samples/smollm2.yaml" apply_sample
    phase "Wait until smollm2 is Ready" wait_until_ready
    echo
    kubectl get ld,pods
    ask
    cat <<END

All of it took $((SECONDS - begun)) s. Three things to try next:

  export KUBECONFIG=$KUBECONFIG_FILE PATH=$(dirname "$KUBECTL"):\$PATH
  kubectl describe ld smollm2                  # conditions, groups, events
  kubectl scale ld/smollm2 --replicas=2        # a second group of three ranks
  kubectl explain ld.spec --recursive          # every field

\`make demo-down\` removes it all again.
END
}

down() {
    [ -x "$LLAMA_CLUSTER" ] || e2e/build.sh
    "$LLAMA_CLUSTER" --name "$NAME" down
    rm -rf "$LOGS"
}

case ${1:-} in
up) up ;;
down) down ;;
*)
    echo "demo.sh: say up or down" >&2
    exit 1
    ;;
esac
