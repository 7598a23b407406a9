# make demo    set up, then train and evaluate on toy street scenes
# make test    set up with the packages for development, then run the tests
# make docs    set up with the packages for development, then build the documentation site
# make live    set up with the packages for development, then build the live page; make docs adds it
VENV ?= .venv
PYTHON ?= python3
TORCH ?=
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check

.PHONY: setup setup-dev demo test live docs lint test-oldest test-python clean-demo

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt third_party/visdom/pyproject.toml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: specify another one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(TORCH) -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python utils/run_demo.py

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

live: setup-dev
	$(BIN)/python utils/serve.py --build-only --out docs/_build/site/live

docs: setup-dev
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . docs/_build/html
	@echo "open docs/_build/html/index.html, or for the search:"
	@echo "    $(BIN)/python -m http.server --directory docs/_build/html"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lower end of the supported versions (the last PyTorch for Pascal GPUs from PyPI).
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH="torch==2.6.0 torchvision==0.21.0"

# Another version of Python: import, prediction, a short training.
# make test-python PYTHON=python3.13
OTHER := .venv-$(notdir $(PYTHON))
SHORT := --datadir $(OTHER)/toy --height 64 --width 128 --encoder-epochs 1 --num-epochs 1 \
	--batch-size 2 --num-workers 0
test-python:
	$(MAKE) setup VENV=$(OTHER)
	$(OTHER)/bin/lednet predict docs/toy_street.png --out $(OTHER)/predictions
	$(OTHER)/bin/python datasets/make_toy_cityscapes.py --out $(OTHER)/toy --train 6 --val 3 \
		--test 0 --train-extra 0
	rm -rf $(OTHER)/run
	$(OTHER)/bin/lednet train $(SHORT) --savedir $(OTHER)/run
	@echo "passed with $$($(OTHER)/bin/python --version)"

clean-demo:
	rm -rf save/demo datasets/toy_cityscapes
