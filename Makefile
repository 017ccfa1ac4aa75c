# llama-operator. `make help` lists the targets.

CACHE := $(or $(LLAMA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llama-operator)
TOOLS := $(CACHE)/tools
export LLAMA_CACHE := $(CACHE)
export PATH := $(TOOLS)/bin:$(HOME)/.cargo/bin:$(PATH)

MODEL := $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf
# Tests with the real model find it here; without it they say so and skip.
export LLAMA_TEST_MODEL := $(MODEL)
# The same for tests with the real tokenizers and chat templates.
export LLAMA_TEST_TOKENIZERS := $(CACHE)/tokenizers

CARGO := cargo
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo demo-down test unit e2e lint fmt generate images bench-worker toolchain

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## From a fresh machine to a chat answer of a real model on a real cluster
	@e2e/toolchain.sh base
	@e2e/demo.sh up

demo-down: ## Remove everything that the demo made
	@e2e/demo.sh down

test: ## All tests: unit, properties, real model, real API server, end to end
	@e2e/run-tests.sh unit e2e

unit: ## Tests that need no cluster
	@e2e/run-tests.sh unit

e2e: ## End-to-end tests on a local cluster (root on Linux, or Docker with kind)
	@e2e/run-tests.sh e2e

lint: ## Formatting, clippy, dependency rules, shell scripts, documentation
	@e2e/toolchain.sh lint
	@e2e/lint.sh

fmt: ## Format the code
	$(CARGO) fmt --all

generate: ## Write the CRD, the chart's copy of it and the reference docs from the types
	$(CARGO) run --quiet -p llama-crds --bin crdgen -- write

images: ## Build the container images as archives under target/images
	@e2e/toolchain.sh base
	@e2e/images.sh

bench-worker: $(MODEL) ## Tokens per second of one worker, as JSON
	@$(CARGO) run --quiet --release -p llama-model --example decode_speed -- $(MODEL)

$(MODEL):
	@e2e/fetch-model.sh $@
