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
# The same for tests with the real embedding model.
export LLAMA_TEST_EMBEDDING_MODEL := $(CACHE)/embedding/all-minilm-l6-v2

CARGO := cargo
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo demo-down test unit e2e e2e-long check-cuda lint fuzz fmt generate images toolchain \
	kubectl-llama clients bench-worker bench-perplexity bench-load bench-memory bench-prefix \
	bench-serve bench-operator

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

e2e-long: ## The same tests where time matters, longer: 50 tries, 10 min at rest, 2,000-token answers, 200 deployments
	@e2e/run-tests.sh long

check-cuda: ## Compile and link the worker with CUDA and NCCL; runs on machines without a GPU
	@e2e/toolchain.sh cuda
	@e2e/cuda/check.sh

clients: $(MODEL) $(LLAMA_TEST_EMBEDDING_MODEL) ## Published clients against a worker: openai for Python and Node, lm-eval, inference-perf
	@e2e/toolchain.sh base
	@e2e/fetch-tokenizers.sh $(LLAMA_TEST_TOKENIZERS)
	@e2e/clients/run.sh $(MODEL) $(LLAMA_TEST_EMBEDDING_MODEL) $(LLAMA_TEST_TOKENIZERS)/llama3-json

lint: ## Formatting, clippy, dependency rules, shell scripts, documentation
	@e2e/toolchain.sh lint
	@e2e/lint.sh

fuzz: ## Fuzz the parsers of untrusted input for a minute each; needs a nightly Rust
	@inference-worker/fuzz/run.sh

fmt: ## Format the code
	$(CARGO) fmt --all

generate: ## Write the CRDs, the chart's copies of them and the reference docs from the types
	$(CARGO) run --quiet -p llama-crds --bin crdgen -- write

kubectl-llama: ## Install the plugin for kubectl, `kubectl llama`, with Cargo's programs
	$(CARGO) install --quiet --locked --path operator/kubectl-llama

images: ## Build the container images as archives under target/images
	@e2e/toolchain.sh base
	@e2e/images.sh

bench-worker: $(MODEL) ## Tokens per second of one worker, as JSON (THREADS=n)
	@$(CARGO) run --quiet --release --locked -p llama-worker -- bench --model $(MODEL) --json $(if $(THREADS),--threads $(THREADS))

bench-perplexity: $(MODEL) ## Perplexity on TEXT=FILE, ours and llama.cpp's (CHUNKS=40), as JSON
	@e2e/toolchain.sh bench
	@e2e/bench.sh perplexity $(MODEL) $(or $(TEXT),"") $(or $(CHUNKS),40)

bench-load: ## Loading 2.5 GB cold, against dd (REPEATS=3), as JSON
	@e2e/bench.sh load $(or $(REPEATS),3)

bench-prefix: $(MODEL) ## TRACE=FILE answered with prefix caching and without (REQUESTS=100), as JSON
	@e2e/bench.sh prefix $(MODEL) $(or $(TRACE),"") $(or $(REQUESTS),100)

bench-memory: $(MODEL) ## Planned and measured memory (TOKENS=2048), as JSON
	@e2e/bench.sh memory $(MODEL) $(or $(TOKENS),2048)

bench-serve: $(MODEL) ## TRACE=FILE answered by this worker, llama.cpp and mistral.rs (SERVE_THREADS="1 2"), as JSON
	@e2e/toolchain.sh bench
	@e2e/bench.sh serve $(MODEL) $(or $(TRACE),"")

bench-operator: ## DEPLOYMENTS=1000 of two simulated pods on a real API server, beside a peer (REPEATS=1), as JSON
	@e2e/toolchain.sh base
	@e2e/bench.sh operator

$(MODEL):
	@e2e/fetch-model.sh $@

$(LLAMA_TEST_EMBEDDING_MODEL):
	@e2e/fetch-embedding-model.sh $@
