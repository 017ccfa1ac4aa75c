#!/usr/bin/env bash
# Compiles the test doubles for one program, which may need functions that they do not
# have: those get a stand-in that says so. Run in the environment of toolkit.sh.
#
#   build.sh PROGRAM FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
program=${1:?say which program they are for}
folder=${2:?say which folder to write}

mkdir -p "$folder/work"
work=$folder/work

functions_of() { nm --defined-only "$1" | sed -n 's/.* T //p' | sort; }

compile() { # source object flag…
    local source=$1 object=$2
    shift 2
    gcc -c -std=gnu11 -O1 -g -fPIC -Wall -Wextra -Werror -I "$CUDA_HOME/include" -I "$here" \
        "$@" -o "$work/$object" "$here/$source"
}

# One library: its objects, and a stand-in for whatever of `needed` they do not define.
library() { # soname needed-list end-of-a-call object…
    local name=$1 needed=$2 end=$3
    shift 3
    local objects=("${@/#/$work/}")
    for object in "${objects[@]}"; do functions_of "$object"; done | sort -u >"$work/defined"
    sort -u "$needed" | comm -23 - "$work/defined" |
        sed "s/.*/int &(void) { dprintf(2, \"the test double of $name lacks &\\\\n\"); $end; }/" |
        sed '1i #define _GNU_SOURCE\n#include <stdio.h>\n#include <stdlib.h>' >"$work/rest.c"
    # As in the real libraries, the version of a symbol is its library's name.
    printf '%s { *; };\n' "$name" >"$work/versions"
    gcc -shared -fPIC -O1 -o "$folder/$name" -Wl,-soname,"$name" -Wl,--version-script,"$work/versions" \
        "${objects[@]}" "$work/rest.c" -Wl,--as-needed -L "$folder" "${LIBRARIES[@]}" -pthread
}

program_needs() { nm -D --undefined-only "$program" | sed -n "s/^ *U \($1[A-Za-z0-9_]*\).*/\1/p"; }

# Every function of cuda.h, as toolkit.sh's stand-in has them: NOT_SUPPORTED.
nm -D --defined-only "$CUDA_HOME/lib/stubs/libcuda.so" | sed -n 's/.* T \(cu.*\)/\1/p' >"$work/cuda"
program_needs cublas | sed '/^cublasLt/d' >"$work/cublas"
program_needs curand >"$work/curand"
program_needs nccl >"$work/nccl"

compile driver.c driver.o
compile nccl.c nccl.o
compile libraries.c cublas.o -DCUBLAS
compile libraries.c curand.o -DCURAND

LIBRARIES=()
library libcuda.so.1 "$work/cuda" "return 801" driver.o
ln -sf libcuda.so.1 "$folder/libcuda.so"
LIBRARIES=(-lcuda)
library libnccl.so.2 "$work/nccl" "abort()" nccl.o
library libcublas.so.13 "$work/cublas" "abort()" cublas.o
library libcurand.so.10 "$work/curand" "abort()" curand.o
