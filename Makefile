# make demo: the whole job on a small data set.  make test: all checks.  make fuzz: mutations by the thousand, for hours.
# make quick: ruff, mypy and the tests that are not slow and need neither SLURM nor a GPU.
# All set everything up first.  make test has three workers for two cores: tests on SLURM wait much of their time.
# make PYTHON=python3.12 ... chooses the interpreter of the virtual environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick fuzz lint setup slurm-setup clean

demo: setup
	$(BIN)/vitpa prep digits
	$(BIN)/vitpa sweep submit demo --wait
	$(BIN)/vitpa sweep collect demo

test: setup slurm-setup lint
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

quick: lint
	$(BIN)/python -m pytest -m 'not slow and not slurm and not gpu' --numprocesses 2 --dist loadfile --no-loadscope-reorder

fuzz: setup
	$(BIN)/python -m pytest -m fuzz --hypothesis-profile=long --timeout=0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/ready

slurm-setup:
	bash .system-packages.sh $(PYTHON) slurm

.venv/ready: pyproject.toml .system-packages.sh
	bash .system-packages.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing Python packages into .venv (PyTorch is several GB: minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[dev,search,parquet]' --config-settings editable_mode=compat
	touch $@

clean:
	rm -rf .venv outputs data
