# Every target makes .venv first if it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := $(wildcard adapters/kernels/native/*.cpp adapters/kernels/native/*.h server/model/native/*.cpp server/model/native/*.h)
QUICK_CLIENTS := $(patsubst %,.venv-%/.installed,legacy inferless moto)
CLIENTS := $(patsubst %,.venv-%/.installed,sdk ollama)
NODE := tests/e2e/node/node_modules/.installed

.PHONY: install serve test test-clients test-web lint test-gpu bench docs train

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

# Clients (and one server) whose pins clash with ours have environments of their own: .venv-NAME from
# tests/e2e/NAME-clients.txt.
.venv-%/.installed: tests/e2e/%-clients.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet -r $<
	touch $@

$(NODE): tests/e2e/node/package.json
	cd tests/e2e/node && npm install --silent --no-audit --no-fund --no-package-lock
	touch $@

install: $(STAMP)

serve: $(STAMP)
	$(BIN)/motet serve $(ARGS)

test: $(STAMP) $(QUICK_CLIENTS)
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-clients: $(STAMP) $(CLIENTS) $(NODE)
	$(BIN)/pytest -m clients $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu $(ARGS)

test-web: $(STAMP) $(NODE)
	$(BIN)/pytest -m web $(ARGS)

.venv/.docs: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: $(STAMP)
	$(BIN)/motet bench $(ARGS)

train: $(STAMP)
	$(BIN)/python -m server.embedded.training $(ARGS)
