# `make serve` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
VENV := .venv/bin
MODEL ?= deploy/demo
HTTP_PORT ?= 8000
GRPC_PORT ?= 9000
# Flags of `cantata serve`. The demo model needs no more than this; for another one the engine looks how much memory is free.
SERVE_FLAGS ?= $(if $(filter deploy/demo checkpoints/tiny,$(MODEL)),--kv-cache-memory 256MiB)
# Flags of `make gpu-check`, such as --model checkpoints/gpt-oss-20b or --only tests,step.
GPU_CHECK_FLAGS ?=
# The last lines of each run of pytest in `make test`, shown again at its end.
TEST_SUMMARY := .venv/test-summary.txt
# Tests run side by side: a process per core, four at most, since each needs 1 GB.
PYTEST := $(VENV)/python -m pytest -q -n logical --maxprocesses 4

# Installers leave the libraries uncompiled. Without this each process, not the first alone, would take 5 s to compile torch and Ray
# where an image sets the variable.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test test-clients test-isa test-slow gpu-check lint proto clean

serve: ## Serve $(MODEL), the demo model if none is given, on loopback.
	@scripts/install.sh
	@[ "$(MODEL)" != checkpoints/tiny ] || $(MAKE) --silent --no-print-directory checkpoints/tiny
	@[ "$(MODEL)" != deploy/demo ] || echo "The demo model is a toy on the real engine: see deploy/demo/README.md."
	@exec $(VENV)/cantata serve --standalone --model $(MODEL) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) $(SERVE_FLAGS)

checkpoints/tiny: ## A tiny model of the right shape, with random weights, for benchmarks.
	@scripts/install.sh
	@$(VENV)/cantata make-checkpoint --preset tiny --seed 0 $@

test: ## Lint, type check and the tests.
	@scripts/install.sh dev
	@scripts/install_clients.sh
	@$(MAKE) --no-print-directory lint
	@rm -f $(TEST_SUMMARY)
	@$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not npm" --ignore=tests/interpreter --summary-to $(TEST_SUMMARY)
	@echo "Triton kernels, in Triton's interpreter:"
	@TRITON_INTERPRET=1 $(PYTEST) -m "not slow and not gpu" tests/interpreter --summary-to $(TEST_SUMMARY)
	@echo "All of it:"
	@cat $(TEST_SUMMARY)

test-clients: ## Programs of client libraries (openai, Vercel ai, LangChain, litellm …), which it installs; needs Node.js. `make test` runs the Python ones.
	@scripts/install.sh dev
	@scripts/install_clients.sh npm
	@$(VENV)/python -m pytest -q tests/clients

test-isa: ## Every CPU kernel on emulated x86 processors with and without AVX2, against stored results.
	@scripts/install.sh dev
	@command -v qemu-x86_64 >/dev/null || { echo "needs qemu-x86_64; as root on Debian or Ubuntu: apt-get install qemu-user" >&2; exit 1; }
	@$(VENV)/python -m pytest -q -m isa tests/kernels

test-slow: ## Tests that take minutes.
	@scripts/install.sh dev
	@$(VENV)/python -m pytest -q -m slow

gpu-check: ## On a machine with a GPU: the tests that need one, and the time of everything against the hardware. Has not run on a GPU yet.
	@scripts/install.sh dev
	@PYTHONPATH=. $(VENV)/python -m benchmarks.gpu_check $(GPU_CHECK_FLAGS)

lint:
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check --quiet .
	@$(VENV)/mypy

proto: ## Regenerate the gRPC stubs.
	@scripts/install.sh dev
	@PYTHON=$(VENV)/python PATH="$(CURDIR)/$(VENV):$$PATH" proto/generate.sh

clean:
	rm -rf .venv tests/clients/programs/node_modules checkpoints build *.egg-info
