# make demo   sets up .venv, then pretrains, evaluates and shows pictures
# make test   sets up .venv, then runs all tests
# make docs   sets up .venv, then builds the guide into docs/_build
# make lint   sets up .venv, then checks style and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test docs lint format

demo: $(READY)
	$(BIN)/stellar demo

# A worker for each core, with a thread of its own; each needs about 2 GB.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# A warning, a broken link among them, is an error.
docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --jobs auto docs docs/_build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installed again only when what to install has changed.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# mmcv asks for the OpenCV of desktops, which needs libGL; a bare machine has none.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
		--force-reinstall opencv-python-headless
	touch $(READY)
