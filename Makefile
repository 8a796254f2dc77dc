# Needs only Python 3.11 or newer, pip and make. Each target makes its environment first.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart

.PHONY: quickstart test nightly lint

quickstart: $(VENV)/quickstart.installed
	$(VENV)/bin/llava-jax quickstart --workdir $(WORKDIR)

test: $(VENV)/test.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The launchers' tests look on PATH for what launchers drive.
nightly: $(VENV)/launch.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m pytest -m nightly

# Pyright brings a program of its own from npm at its first start, so the tests do not wait for it.
lint: $(VENV)/test.installed
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(VENV)/%.installed: setup.cfg
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	touch $@

# Beside the tests' packages what launchers drive, through uv (pip may search for very long among what xmanager and xpk
# share), and the TPU compiler.
$(VENV)/launch.installed: $(VENV)/test.installed
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python -e '.[test,launch,plan]'
	touch $@
