# Each target makes .venv first if it is missing. `make demo` needs only Python 3.11 or newer.

PYTHON ?= python3
RUN = PYTHON=.venv/bin/python PREPARE="$(PREPARE)" bash run.sh
# A model of 0.4 million weights, from scratch.
OUTPUT = output/demo
DEMO = --input input/demo --output $(OUTPUT) --exp demo --model test_resnet --weights none --size 64 \
       --epochs 11 --batch-size 32 --lr 5e-3 --min-lr 3e-4

.PHONY: demo test test-slow install lint lock pins handover

# make handover EXP=base writes what winners hand in, OUTPUT/handover_EXP.zip. EXP="a b" is a blend; HANDOVER holds
# further flags of kit/submit/handover.py.
EXP ?= base
handover: OUTPUT = output
handover: .venv/installed
	.venv/bin/python -m kit.submit.handover $(EXP) --output $(OUTPUT) $(HANDOVER)

demo: .venv/installed
	.venv/bin/python input/make_demo.py
	$(RUN) $(DEMO)

# pytest runs two processes, which share the cores: one thread each.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow"

test-slow: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

install: .venv/installed

# Without --compile-bytecode, the first start of a script compiles torch for half a minute.
.venv/installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade uv
	.venv/bin/uv pip install --python .venv/bin/python --quiet --compile-bytecode --require-hashes -r requirements.lock
	touch $@

lock: .venv/installed
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes \
	    --custom-compile-command "make lock" requirements-dev.txt -o requirements.lock

# Checks requirements.txt against each Python and against the packages of Kaggle and Colab; needs the network.
pins: .venv/installed
	for python in 3.11 3.12 3.13; do \
	    .venv/bin/uv pip compile --quiet --python-version $$python requirements.txt >/dev/null || exit; done
	for pins in tests/pins/*.txt; do python=$${pins##*-}; \
	    .venv/bin/uv pip compile --quiet --python-version $${python%.txt} requirements.txt -c $$pins >/dev/null || exit; done
