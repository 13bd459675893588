# make demo      a sentence becomes a LoRA becomes a clip, in out/demo (PROMPT="..." takes your own sentence)
# make test      the tests, in two processes (WORKERS=...)
# make lint      ruff and mypy
# make .venv     only the environment that the others use
# PYTHON=...     the Python (3.11 or newer) that makes the environment

PYTHON ?= python3
WORKERS ?= 2
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt

# The sentence reaches the demo through the environment, unexpanded, so that quotes, $ and # in it stay what they are.
# Only a PROMPT given to make counts: shells keep their own prompt in a variable of that name.
unexport PROMPT
ifeq ($(origin PROMPT),command line)
export LOFA_PROMPT := $(value PROMPT)
endif

.PHONY: help .venv demo test lint

help:
	@sed -n 's/^# make/make/p' Makefile

demo: .venv/installed
	.venv/bin/python -m training.miniature.demo --out out/demo $${LOFA_PROMPT+--prompt="$$LOFA_PROMPT"}

test: .venv/installed
	.venv/bin/python -m pytest -n $(WORKERS) --no-loadscope-reorder

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

.venv: .venv/installed

# An environment that no longer runs, or runs an older Python, is made anew; one that runs is brought up to date.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is missing or older than 3.11; name a newer one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[train,dev]'
	@touch $@
