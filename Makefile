# Each target sets up what it needs: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
# Processes of one core each.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all faults lint bench docs clean

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/ready  ## train the embedded model and show what it learned
	$(BIN)/python train.py example/quickstart-sft.yml
	@echo
	@echo "Three prompts that it has not seen, answered by the trained model:"
	$(BIN)/minitrain generate runs/quickstart-sft --prompt "57 + 36 =" "42 - 25 =" "reverse tiger"

test: .venv/ready  ## the tests, without the slow ones
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/ready  ## every test; before a release
	$(BIN)/python -m pytest $(PARALLEL) -m ""

faults: .venv/ready  ## runs that are killed, stopped and starved, all of them
	$(BIN)/python -m pytest -m "" tests/faults -v

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready  ## against TRL and a loop written by hand, in one run
	$(BIN)/python bench/run.py
	$(BIN)/python bench/run.py --lora 16
	$(BIN)/python bench/ranks.py
	$(BIN)/python bench/dpo.py
	$(BIN)/python bench/divergence.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/head.py

docs: .venv/ready  ## the pages that are made: options from the schema, commands from their --help
	$(BIN)/python docs/generate_options.py > docs/options.md
	$(BIN)/python docs/generate_commands.py > docs/commands.md

clean:
	rm -rf .venv runs
