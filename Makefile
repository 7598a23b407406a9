# make demo    set up, then train and score on toy streets
# make test    set up, then run the tests
# make docs    set up, then build the documentation site
VENV ?= .venv
PYTHON ?= python3
TORCH ?=
BIN := $(VENV)/bin

.PHONY: setup demo test docs lint test-oldest clean-demo

setup: $(VENV)/.installed

$(VENV)/.installed: $(wildcard requirements*.txt) third_party/visdom/pyproject.toml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: name another with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check $(TORCH) -e . -r requirements.txt -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python utils/run_demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . docs/_build/html
	@echo "open docs/_build/html/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lower end of the supported versions (the last PyTorch for Pascal GPUs from PyPI).
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH="torch==2.6.0 torchvision==0.21.0"

clean-demo:
	rm -rf save/demo datasets/toy_cityscapes
