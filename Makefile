# Every target makes .venv first if it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CLIENTS := .venv-clients/.installed
SDKS := .venv-sdks/.installed
OLLAMA := .venv-ollama/.installed
NODE := tests/e2e/node/node_modules/.installed
INFERLESS := .venv-inferless/.installed

.PHONY: install serve test test-clients lint test-gpu bench train

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

$(CLIENTS): tests/e2e/legacy-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet -r $<
	touch $@

$(SDKS): tests/e2e/sdk-clients.txt
	$(PYTHON) -m venv .venv-sdks
	.venv-sdks/bin/pip install --quiet -r $<
	touch $@

$(OLLAMA): tests/e2e/ollama-client.txt
	$(PYTHON) -m venv .venv-ollama
	.venv-ollama/bin/pip install --quiet -r $<
	touch $@

$(NODE): tests/e2e/node/package.json
	cd tests/e2e/node && npm install --silent --no-audit --no-fund --no-package-lock
	touch $@

$(INFERLESS): tests/e2e/inferless-client.txt
	$(PYTHON) -m venv .venv-inferless
	.venv-inferless/bin/pip install --quiet -r $<
	touch $@

install: $(STAMP)

serve: $(STAMP)
	$(BIN)/motet serve $(ARGS)

test: $(STAMP) $(CLIENTS) $(INFERLESS)
	$(BIN)/pytest $(ARGS)

test-clients: $(STAMP) $(SDKS) $(OLLAMA) $(NODE)
	$(BIN)/pytest -m clients $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu $(ARGS)

bench: $(STAMP)
	$(BIN)/motet bench $(ARGS)

train: $(STAMP)
	$(BIN)/python -m server.embedded.training $(ARGS)
