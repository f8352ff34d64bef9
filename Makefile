# Each target sets up what it needs: a virtual environment, the package, the native kernels.
# On a machine with a GPU choose your own PyTorch: make serve TORCH=torch DEVICE=cuda
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= nano
DEVICE ?= cpu
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
BIN = $(VENV)/bin

.PHONY: serve chat test test-slow test-interop test-clients test-page lint check bench train clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ :/'

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) --editable .
	$(BIN)/python -m stepflash.kernels.build
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(PIP) --editable '.[dev]'
	@touch $@

serve: $(VENV)/.runtime  ## serve MODEL (default: nano) at http://127.0.0.1:8000
	$(BIN)/stepflash serve $(MODEL) --device $(DEVICE)

chat: $(VENV)/.runtime  ## chat with MODEL in the terminal
	$(BIN)/stepflash chat $(MODEL) --device $(DEVICE)

test: $(VENV)/.development  ## the tests, on every core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m 'not slow'

test-slow: $(VENV)/.development  ## the long ones: a hundred agent turns and the like
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

lint: $(VENV)/.development  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## what a change must pass

INTEROP ?= $(HOME)/.cache/stepflash/interop
test-interop:  ## our exports in llama.cpp and transformers (their own environment; builds llama.cpp's library once)
	test -d $(INTEROP) || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet '$(TORCH)' --editable '.[dev]' transformers==5.24.0
	STEPFLASH_LLAMA_LIB=$${STEPFLASH_LLAMA_LIB:-$$($(INTEROP)/bin/python benchmarks/llama_cpp.py)} \
		OMP_NUM_THREADS=2 $(INTEROP)/bin/python -m pytest -rs -s tests/interop

CLIENTS ?= $(HOME)/.cache/stepflash/clients
NPM_PACKAGES = node@22 @anthropic-ai/claude-code @openai/codex opencode-ai @musistudio/claude-code-router@2.0.0
test-clients: $(VENV)/.development  ## Claude Code, Codex, opencode, claude-code-router, the SDKs and a browser, on loopback
	$(PIP) openai anthropic playwright
	mkdir -p $(CLIENTS)
	for package in $(NPM_PACKAGES); do \
		PATH="$(CLIENTS)/node_modules/.bin:$$PATH" npm install --prefix $(CLIENTS) --no-fund --no-audit --loglevel=error $$package \
			|| echo "$$package cannot be installed here; its tests will be skipped"; \
	done
	STEPFLASH_CLIENTS=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/pytest -rs -m client --ignore tests/interop

test-page: $(VENV)/.development  ## the chat page in headless Chromium (Debian: apt-get install chromium)
	$(PIP) playwright
	command -v chromium > /dev/null || apt-get install -y --no-install-recommends chromium \
		|| echo 'there is no chromium; the tests of the page will be skipped'
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs tests/server/test_page.py

bench: $(VENV)/.runtime  ## decode and prefill speed of MODEL on this machine
	$(BIN)/stepflash bench decode $(MODEL)

train: $(VENV)/.runtime  ## train nano from scratch into runs/nano (hours; Ctrl-C and go on later)
	$(BIN)/python -m stepflash.nano.train --out runs/nano

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
