# make demo       everything on built-in data, in about 13 minutes on 2 cores; open runs/demo/report.html
# make bundle     the built-in bundle, unitok/bundles/scenes, from its recipe: a night on 2 cores, less than half an hour of it with a GPU; goes on where it was stopped
# make test       the tests, one process per core (at most 4)
# make check      lint and types
# make docs       the documentation's site, strictly: a dead link is an error; open site/index.html
# make check-long heavier proofs: kills, longer trainings
# make figures    the figures of the README and of the model that ships, and the notebook, from the built-in bundle
# make benchmarks-page   docs/benchmarks.md and docs/results.md, from benchmarks/results/
# make env        the environment that all of them share: .venv, pinned by constraints.txt
#
# On a machine without a GPU, PyTorch's CPU build saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_INDEX ?=
MINUTES ?= 13
# What scripts may do, whose settings are dictionaries; that names and arguments exist is checked
LOOSE := $(addprefix --disable-error-code ,arg-type assignment dict-item misc union-attr var-annotated)

.PHONY: demo bundle test check docs check-long figures benchmarks-page env clean

demo: env
	$(VENV)/bin/unitok demo --minutes $(MINUTES)

bundle: env
	$(VENV)/bin/python -m unitok.scenes.recipe runs/recipe

test: env
	$(VENV)/bin/python -m pytest -m "not long" --numprocesses logical --maxprocesses 4 --dist loadfile

check: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks $(LOOSE)

docs: env
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs --quiet build

check-long: env
	$(VENV)/bin/python -m pytest -m long

figures: env
	$(VENV)/bin/python docs/figures/readme.py
	$(VENV)/bin/python docs/figures/sheet.py
	$(VENV)/bin/python docs/figures/tour.py

benchmarks-page: env
	$(VENV)/bin/python benchmarks/write_page.py
	$(VENV)/bin/python benchmarks/write_results_page.py

env: $(VENV)/.complete

# torch first and by itself: its build decides what everything else may load. The two reference packages come without
# their dependencies, which would bring a torchvision and a torchaudio that do not load beside a CPU build of torch; so does
# xformers, which would bring another torch.
$(VENV)/.complete: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps taming-transformers==0.0.1 encodec==0.1.1
	$(PIP) install --quiet --no-deps --only-binary :all: xformers==0.0.35 || echo "no xformers for this machine: it is optional"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
