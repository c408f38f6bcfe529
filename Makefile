# Each target sets up what it needs: a virtual environment, made once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The supported interpreters that this machine has, in PATH or from pyenv.
PYTHONS ?= $(shell for v in 10 11 12 13 14; do \
	for p in python3.$$v $(HOME)/.pyenv/versions/3.$$v.*/bin/python; do \
	if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done; done)
# Processes of one core each.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

# Of tests/processors.py.
PROCESSORS := sse avx2 bfloat16 amx

.PHONY: demo test test-all test-processors test-pythons architectures faults lint bench bench-gpu docs clean

$(VENV)/ready: setup.py constraints.txt
	@echo "Installing PyTorch and the other packages into $(VENV), which takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

demo: $(VENV)/ready  ## train the embedded model and show what it learned
	$(BIN)/python train.py example/quickstart-sft.yml
	@echo
	@echo "Three prompts that it has not seen, answered by the trained model:"
	$(BIN)/minitrain generate runs/quickstart-sft --prompt "57 + 36 =" "42 - 25 =" "reverse tiger"

test: $(VENV)/ready  ## the tests, without the slow ones
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(VENV)/ready  ## every test; before a release
	$(BIN)/python -m pytest $(PARALLEL) -m ""
	$(MAKE) test-processors

test-processors: $(VENV)/ready  ## the numeric tests as on other processors
	@for processor in $(PROCESSORS); do \
		echo "== as on $$processor"; \
		AS_PROCESSOR=$$processor $(BIN)/python -m pytest $(PARALLEL) -m "numeric and not slow" || exit 1; \
	done

test-pythons:  ## the tests under every Python from 3.10 on that this machine has
	@for python in $(PYTHONS); do \
		version=$$($$python -c "import sys; print('%d.%d' % sys.version_info[:2])"); \
		echo "== Python $$version"; \
		$(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$version || exit 1; \
	done

architectures: $(VENV)/ready  ## every model type of transformers, about 15 minutes; writes docs/architectures.md
	$(BIN)/python -m tests.architectures --update
	$(BIN)/python docs/generate_architectures.py

faults: $(VENV)/ready  ## runs that are killed, stopped and starved, all of them
	$(BIN)/python -m pytest -m "" tests/faults -v

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/ready  ## against TRL and a loop written by hand, in one run
	$(BIN)/python bench/run.py
	$(BIN)/python bench/run.py --lora 16
	$(BIN)/python bench/ranks.py
	$(BIN)/python bench/dpo.py
	$(BIN)/python bench/rl.py
	$(BIN)/python bench/divergence.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/head.py
	$(BIN)/python bench/encoding.py --rows 50000

# Installs nothing, so that it runs without network: in .venv if that is there, else with the Python that has torch.
BENCH_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

bench-gpu:  ## on one GPU, 25 minutes; BENCH="--phases B --minutes 5" for a part
	$(BENCH_PYTHON) bench/gpu.py $(BENCH)

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/pip install --quiet -e ".[docs]" -c constraints.txt
	touch $@

docs: $(VENV)/docs-ready  ## the generated pages, and the site in site/
	$(BIN)/python docs/generate_options.py > docs/options.md
	$(BIN)/python docs/generate_commands.py > docs/commands.md
	$(BIN)/python docs/generate_migrating.py
	$(BIN)/python docs/generate_mutations.py
	$(BIN)/python docs/generate_templates.py
	$(BIN)/python docs/generate_architectures.py
	$(BIN)/python docs/generate_api.py > docs/api.md
	$(BIN)/python docs/generate_errors.py > docs/errors.md
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-* runs site
