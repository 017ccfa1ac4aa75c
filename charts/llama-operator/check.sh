#!/usr/bin/env bash
# Lints the chart, renders it with several values, and sees that wrong values are refused.
# $HELM is the helm to use, else the one in PATH; without one nothing is checked.
set -euo pipefail
cd "$(dirname "$0")"

helm=${HELM:-$(command -v helm || true)}
if [ -z "$helm" ]; then
    echo "chart: not checked: no helm in \$HELM or PATH" >&2
    exit 0
fi

fail() {
    printf 'chart: %s\n' "$*" >&2
    exit 1
}

# The oldest Kubernetes that the chart takes; some builds of helm assume an older one.
kubernetes=1.31.0

render() { "$helm" template llama-operator . --namespace llama-system --kube-version "$kubernetes" "$@"; }

# has TEXT LINE: LINE stands in TEXT, whatever its indentation.
has() { grep -qE "^ *(- )?$2\$" <<<"$1" || fail "no line '$2' in the rendered manifests"; }
lacks() { ! grep -qE -- "$2" <<<"$1" || fail "'$2' in the rendered manifests"; }

refused() { # what it names, then flags
    local names=$1 words
    shift
    if words=$(render "$@" 2>&1); then fail "accepted: $*"; fi
    grep -q -- "$names" <<<"$words" || fail "refused $* without naming $names: $words"
}

"$helm" lint --strict --quiet --kube-version "$kubernetes" .

version=$(sed -n 's/^appVersion: //p' Chart.yaml)
default=$(render)
has "$default" "kind: ClusterRole"
has "$default" "kind: ClusterRoleBinding"
has "$default" "kind: CustomResourceDefinition"
has "$default" "helm.sh/resource-policy: keep"
has "$default" "name: llamadeployments.llmops.dev"
has "$default" "name: llamamodels.llmops.dev"
has "$default" "image: \"llama-operator/operator:$version\""
has "$default" "--worker-image=llama-operator/worker:$version"
has "$default" "--lease-namespace=llama-system"
lacks "$default" "--watch-namespace"
has "$default" "resources: \[nodes\]"

namespaced=$(render --set watchNamespace=models,rbac.aggregateToDefaultRoles=false)
has "$namespaced" "--watch-namespace=models"
has "$namespaced" "namespace: models"
lacks "$namespaced" "kind: ClusterRole"
lacks "$namespaced" "resources: \[nodes\]"

lean=$(render --set crds.install=false,leaderElection=false,image.tag=dev,workerImage.tag=dev)
has "$lean" "image: \"llama-operator/operator:dev\""
has "$lean" "--worker-image=llama-operator/worker:dev"
lacks "$lean" "kind: CustomResourceDefinition"
lacks "$lean" "--lease"
lacks "$lean" "leases"
has "$lean" "type: Recreate"
lacks "$(render --set crds.keep=false)" "resource-policy"

full=$(render --set replicas=2,priorityClassName=system-cluster-critical,log=debug \
    --set 'imagePullSecrets[0]=pull,nodeSelector.pool=control,podAnnotations.team=ml' \
    --set 'tolerations[0].key=control,tolerations[0].operator=Exists')
for line in "replicas: 2" "priorityClassName: system-cluster-critical" "--log=debug" \
    "name: pull" "pool: control" "team: ml" "operator: Exists"; do
    has "$full" "$line"
done

refused replica --set replica=2
refused replicas --set replicas=two
refused replicas --set replicas=2,leaderElection=false
refused pullPolicy --set image.pullPolicy=Sometimes
refused repository --set workerImage.repository=llama/worker:dev
refused watchNamespace --set watchNamespace=Not_A_Namespace
refused log --set log=Loud!
