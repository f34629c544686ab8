# Every target makes what it needs: a fresh machine with Python 3.11 or later and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: help demo test test-slow lint format docs bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP) ## train DifNet-18 on generated shapes, score it and draw it (about four minutes)
	$(BIN)/python -m segmentation.train --overwrite

test: lint ## lint, types and tests (under ten minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-slow: $(STAMP) ## the long tests, which `make test` leaves out
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## build the documentation into build/docs, strictly
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build

bench: $(STAMP) ## print the tables of docs/benchmarks.md (half an hour, idle machine; GRAPHS=folder of .npz graphs, SEEDED=folder of images with seeds, VOC=folder in its layout)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/certificates.py
	$(if $(GRAPHS),$(BIN)/python benchmarks/labels.py --data $(GRAPHS))
	$(BIN)/python benchmarks/path.py $(if $(GRAPHS),--data $(GRAPHS))
	$(BIN)/python benchmarks/heat.py $(if $(GRAPHS),--data $(GRAPHS))
	$(BIN)/python benchmarks/top_k.py $(if $(GRAPHS),--data $(GRAPHS))
	$(BIN)/python benchmarks/sparse.py --slow $(if $(GRAPHS),--data $(GRAPHS))
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/random_walker.py $(if $(SEEDED),--data $(SEEDED))
	$(if $(VOC),$(BIN)/python benchmarks/loading.py --data-path $(VOC))
	$(if $(VOC),$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[crf]')
	$(if $(VOC),$(BIN)/python benchmarks/crf.py --data-path $(VOC))

clean: ## remove the virtual environment and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
