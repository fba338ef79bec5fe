# The developer's loop. Every target makes .venv on first use and again when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench bench-kv protos clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Tandem needs Python 3.11 or newer: $(PYTHON) was not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tandem needs Python 3.11 or newer; use make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/tandem demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/python -m tools.check

# VLLM=1 also measures vLLM's CPU build, in an environment made for it below build/
bench: $(STAMP)
	$(BIN)/python -m benchmarks.engine $(if $(VLLM),--with-vllm)
	$(BIN)/python -m benchmarks.link

# KV transfer: codecs, the controller's decisions, faults, job completion over shaped links (about 15 minutes)
bench-kv: $(STAMP)
	$(BIN)/python -m benchmarks.codec
	$(BIN)/python -m benchmarks.kv_controller
	$(BIN)/python -m benchmarks.kv_soak
	$(BIN)/python -m benchmarks.kv_links

protos: $(STAMP)
	$(BIN)/python -m tools.protos

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
