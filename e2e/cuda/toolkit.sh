#!/usr/bin/env bash
# A CUDA toolkit and NCCL out of Python packages, for machines that have neither them
# nor a GPU. Installs it into the cache unless it is there, and prints the environment
# that a CUDA build needs:
#
#   eval "$(e2e/cuda/toolkit.sh)"
#   cargo build -p llama-worker --features cuda,nccl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
# What is compiled for: Hopper. A machine with another GPU sets it beforehand.
COMPUTE_CAPABILITY=${CUDA_COMPUTE_CAP:-90}
CUDA_VERSION=13000
# The installed tree has 1.6 GB; its wheels and their copies come on top for a while.
NEEDED_GB=5

# Another set of wheels is another folder, and another compiler to cargo.
installed=$CACHE/cuda/$(sha256sum <"$here/wheels.txt" | cut -c1-16)

say() { printf '  cuda: %s\n' "$*" >&2; }

fail() {
    printf 'cuda/toolkit.sh: %s\n' "$*" >&2
    exit 1
}

# The wheels hold versioned libraries only; linkers look for names without a version.
link_libraries() { # folder
    local library name
    for library in "$1"/lib*.so.*; do
        name=${library##*/}
        ln -sf "$name" "$1/${name%%.so.*}.so"
    done
}

# The driver's library belongs to the driver and is in no package. As in NVIDIA's own
# toolkit, a stand-in to link against lies under lib/stubs.
stand_in_for_driver() {
    local work
    work=$(mktemp -d "$installed/stubs.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    printf '#include <cuda.h>\n' | gcc -E -P -I "$installed/include" - | tr ';{' '\n' |
        sed -n 's/.*[ *]\(cu[A-Z][A-Za-z0-9_]*\) *(.*/\1/p' |
        grep -vxE 'cuGetErrorName|cuGetErrorString' | sort -u |
        sed 's/.*/FUNCTION(&)/' >"$work/absent_driver.inc"
    gcc -shared -fPIC -O1 -Wall -Werror -I "$work" -Wl,-soname,libcuda.so.1 \
        -o "$work/libcuda.so.1" "$here/absent_driver.c"
    mkdir -p "$installed/lib/stubs"
    mv "$work/libcuda.so.1" "$installed/lib/stubs/"
    ln -sf libcuda.so.1 "$installed/lib/stubs/libcuda.so"
    rm -rf "$work"
    trap - EXIT
}

install() {
    local free work
    mkdir -p "$CACHE/cuda"
    free=$(($(df --output=avail -k "$CACHE/cuda" | tail -1) / 1024 / 1024))
    [ "$free" -ge "$NEEDED_GB" ] ||
        fail "$free GB are free under $CACHE, the CUDA toolkit needs $NEEDED_GB"
    work=$(mktemp -d "$CACHE/cuda/install.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    say "installing compiler, libraries and NCCL (1.1 GB to download, once)"
    # A package client of our own: the system's may be absent or managed.
    python3 -m venv "$work/python"
    "$work/python/bin/pip" install -q --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        --target "$work/tree" -r "$here/wheels.txt"
    mv "$work/tree/nvidia/nccl/include"/nccl*.h "$work/tree/nvidia/cu13/include/"
    mv "$work/tree/nvidia/nccl/lib"/libnccl.so.* "$work/tree/nvidia/cu13/lib/"
    link_libraries "$work/tree/nvidia/cu13/lib"
    ln -s lib "$work/tree/nvidia/cu13/lib64"
    # Complete or not there: the folder takes its name when nothing is missing.
    mv -T "$work/tree/nvidia/cu13" "$installed" 2>/dev/null || [ -d "$installed" ] ||
        fail "could not move the toolkit to $installed"
    rm -rf "$work"
    trap - EXIT
}

[ -d "$installed" ] || install
stand_in_for_driver
for variable in CUDA_HOME CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR; do
    printf 'export %s=%q\n' "$variable" "$installed"
done
printf 'export NVCC=%q/bin/nvcc\n' "$installed"
printf 'export CUDA_COMPUTE_CAP=%q\n' "$COMPUTE_CAPABILITY"
printf 'export CUDARC_CUDA_VERSION=%s\n' "$CUDA_VERSION"
printf 'export CUDAFORGE_THREADS=%s\n' "$(nproc)"
# shellcheck disable=SC2016  # for the caller's shell to expand
printf 'export PATH=%q/bin:$PATH\n' "$installed"
