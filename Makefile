# Everything runs from .venv, which the first target that needs it makes. `make help` lists the targets.

# Another Python than the first of these that the pins fit: `make PYTHON=/path/to/python3.12`.
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
PINS := config/requirements-torch.txt config/requirements-cpu.txt config/requirements-dev.txt
# Asked only where pip finds no CPU build of torch by itself.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := install
.DELETE_ON_ERROR:
.PHONY: install runtime demo fleet quick test check bench card attack chaos families clients fuzz clean help

install: $(STAMP) ## Make .venv with everything pinned (about two minutes; a second time nothing)

$(STAMP): $(PINS) config/tests.npm pyproject.toml
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "The CPU build of vLLM exists for Linux on x86-64 only; elsewhere use the image (Dockerfile)."; exit 1; }
	@test -x $(PY) || { \
		for python in $(PYTHONS); do $$python -c "$(FITS)" 2>/dev/null && break; python=; done; \
		test -n "$$python" || { echo "None of these is Python 3.11, 3.12 or 3.13: $(PYTHONS)"; exit 1; }; \
		echo "== making $(VENV) with $$python"; $$python -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@$(PY) -c "import ctypes; ctypes.CDLL('libnuma.so.1')" 2>/dev/null || { echo "vLLM needs the system library libnuma.so.1: apt-get install libnuma1, or dnf install numactl-libs"; exit 1; }
	@$(MAKE) --no-print-directory runtime
	@echo "== installing the tools for tests, checks and the demo"
	@$(PIP) install --no-deps -r config/requirements-dev.txt
	@command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix $(VENV)/node $$(cat config/tests.npm) || echo "== without npm the tests of single sign-on are left out"
	@echo "== linking this checkout, for the command loraplex"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "== done; try: make demo"

# Into whatever $(PIP) installs into: the CPU image is built with it too.
runtime:
	@echo "== installing the CPU build of torch"
	@$(PIP) install --no-deps -r config/requirements-torch.txt 2>/dev/null \
		|| $(PIP) install --no-deps -r config/requirements-torch.txt --extra-index-url $(TORCH_INDEX)
	@echo "== installing vLLM and the server's other packages"
	@$(PIP) install --no-deps -r config/requirements-cpu.txt

demo: $(STAMP) ## Three customers, three voices, one model; ONCE=1 ends after the answers
	@$(PY) -m server demo $(if $(filter-out 0,$(ONCE)),--once)

fleet: $(STAMP) ## A gateway, two replicas, six customers; one replica is killed; ONCE=1 ends after the answers
	@$(PY) -m server fleet demo $(if $(filter-out 0,$(ONCE)),--once) $(if $(RAY),$(if $(filter 0,$(RAY)),--no-ray,--ray))

quick: $(STAMP) ## Run the pure layer of the tests, under a minute: no vLLM, no server
	$(PY) -m pytest -q -n 2 --dist loadfile tests/pure

# Three processes on two cores: tests that kill, restart and expire wait for much of their time. Where Python was
# told to keep no bytecode, each of them would read and rewrite every test.
test: $(STAMP) ## Run all tests, on the real engine too
	PYTHONDONTWRITEBYTECODE= TESTS_FORK_ENGINES=1 $(PY) -m pytest -n 3 --dist loadfile --disable-warnings

check: $(STAMP) ## Lint, formatting, types, and which module may import which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/pure/project/test_imports.py

bench: $(STAMP) ## Measure against bare vLLM, about 45 minutes; SCENARIO=storm for one, RUNS=1, QUICK=1, MINUTES=10
	$(PY) -m tests.bench $(SCENARIO) $(if $(RUNS),--runs $(RUNS)) $(if $(filter-out 0,$(QUICK)),--quick) \
		$(if $(MINUTES),--minutes $(MINUTES))

card: $(STAMP) ## Measure adapters of an 8B model on one GPU, 10 minutes; CPU=1 tries it in small
	$(PY) -m tests.bench.card $(if $(filter-out 0,$(CPU)),--cpu) $(if $(WORKERS),--workers $(WORKERS)) \
		$(addprefix --only ,$(ONLY))

attack: $(STAMP) ## Send every hostile input beside a customer who must not notice, 12 minutes; KIND="many items", MINUTES=60, ENGINE=fake
	ENGINE=$(ENGINE) $(PY) -m $(if $(MINUTES),tests.bench.hostile_time $(MINUTES),tests.bench.attack $(if $(KIND),"$(KIND)"))

chaos: $(STAMP) ## Make faults under load and look for what is lost, 20 minutes; DB=postgres, ENGINE=real, MINUTES=20, FAULT="the engine dies"
	DB=$(DB) ENGINE=$(ENGINE) RUNS=$(RUNS) SEED=$(SEED) MINUTES=$(MINUTES) $(PY) -m tests.bench.chaos $(if $(FAULT),"$(FAULT)")

families: $(STAMP) $(VENV)/qlora/.installed ## Adapters on tiny bases of twenty families and more against PEFT, half an hour; FAMILY=qwen3 for one
	@PYTHONPATH=$(CURDIR):$(VENV)/qlora $(PY) -W ignore -m tests.families $(or $(FAMILY),--write)

# Which trains adapters on four bits, 125 MB: beside .venv's own packages, for nothing else needs it.
$(VENV)/qlora/.installed: $(STAMP)
	$(PIP) install --no-deps --target $(@D) bitsandbytes==0.50.2
	@touch $@

clients: $(STAMP) $(CLIENTS)/.installed ## Run the libraries that people use against a real server, 15 minutes; LIBRARY=openai
	@command -v node >/dev/null && npm install --silent --no-audit --no-fund --prefix .node-clients $$(cat config/clients.npm) || echo "== without node the JavaScript libraries are left out"
	$(PY) -m tests.clients $(CLIENTS)/bin/python "$$(test -d .node-clients/node_modules && realpath .node-clients)" $(if $(LIBRARY),"$(LIBRARY)")

$(CLIENTS)/.installed: config/requirements-clients.txt config/requirements-clients-openai2.txt
	$(PY) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --no-deps -r $<
	$(PY) -m venv $(CLIENTS)/openai2
	$(CLIENTS)/openai2/bin/python -m pip --disable-pip-version-check install --no-deps -r config/requirements-clients-openai2.txt
	@touch $@

fuzz: $(STAMP) ## Parsers of uploads, four minutes; then the API, two hours; COUNT=200000, SEED=0, CASES=2000
	$(PY) -m tests.fuzz $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))
	CASES=$(or $(CASES),2000) $(PY) -m pytest -q -n 2 --timeout 3600 tests/service/http/test_document.py

clean: ## Remove .venv and all caches; data stays
	rm -rf $(VENV) $(CLIENTS) .node-clients .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
