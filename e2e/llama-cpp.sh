#!/usr/bin/env bash
# Builds llama.cpp's llama-bench, llama-perplexity and llama-server for this machine's
# processor, out of the Python package that carries its source, and prints the folder they are
# in. Some minutes, once; what is there already is taken. Benchmarks compare with
# them; nothing else needs them.
#
#   llama-cpp.sh            JOBS=N compiles N files at a time
set -euo pipefail

PACKAGE=llama-cpp-python==0.3.36
ARCHIVE=llama_cpp_python-0.3.36
DIGEST=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
PROGRAMS=(llama-bench llama-perplexity llama-server)

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
FOLDER=$CACHE/llama.cpp
JOBS=${JOBS:-$(nproc)}

say() { printf '  llama.cpp: %s\n' "$*" >&2; }

fail() {
    printf 'llama-cpp: %s\n' "$*" >&2
    exit 1
}

# Which source, for which processor: a build for another one may not run here.
processor=$(sed -n 's/^\(model name\|flags\|Features\)[[:space:]]*: //p' /proc/cpuinfo | sort -u)
wanted="$DIGEST ${PROGRAMS[*]} $(printf '%s' "$processor" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$FOLDER/built-from" 2>/dev/null)" = "$wanted" ]; then
    printf '%s\n' "$FOLDER"
    exit 0
fi

for program in cmake c++; do
    command -v "$program" >/dev/null || fail "$program is missing; e2e/toolchain.sh bench installs it"
done
mkdir -p "$CACHE"
work=$(mktemp -d "$CACHE/llama.cpp.XXXXXX")
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/python"
say "downloading $PACKAGE (77 MB)"
"$work/python/bin/pip" download -q --no-deps --no-binary :all: --dest "$work" "$PACKAGE"
echo "$DIGEST  $work/$ARCHIVE.tar.gz" | sha256sum --check --quiet ||
    fail "$PACKAGE has another sha256 than $DIGEST"
tar -xzf "$work/$ARCHIVE.tar.gz" -C "$work"

say "building ${PROGRAMS[*]} (some minutes, once)"
log=$CACHE/llama.cpp.log
{
    cmake -S "$work/$ARCHIVE/vendor/llama.cpp" -B "$work/build" \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF &&
        cmake --build "$work/build" --parallel "$JOBS" --target "${PROGRAMS[@]}"
} >"$log" 2>&1 || fail "it does not build; $log says why"

rm -rf "$FOLDER"
mkdir "$FOLDER"
for program in "${PROGRAMS[@]}"; do
    mv "$work/build/bin/$program" "$FOLDER/"
done
printf '%s\n' "$wanted" >"$FOLDER/built-from"
rm "$log"
printf '%s\n' "$FOLDER"
