# make help            the list of what there is to make
# make demo            a small AWD-LSTM from nothing: corpus, training, fine-tuning, cache, text; needs no network
# make test            the tests that are quick, and the linter: two to six minutes
# make test-slow       the other tests: killed runs, hostile inputs, other systems, whole scripts: some minutes
# make test-long       training killed 100 times, also under torchrun, and 5,000 hostile inputs: a quarter of an hour
# make test-machines   a part of the tests as other machines would run it: fewer instructions, other locales, not root
# make bench           the speed of each part beside a plain baseline: half an hour, on a machine that does nothing else
# make gpu-check       whether all is right and fast on the GPU; the PYTHON given has torch, numpy, tqdm, pytest
# make reproduce ROW=ptb-qrnn   a row of the papers from end to end; MINUTES=8 stops in time, the same command goes on
# make reproduce ROW=ablation   what each part is worth on a small text: some hours on two cores; for both,
#                      EXTRA="--precision tf32" adds flags
# make clean           forget the environment and the demo

PYTHON ?= python3
VENV = .venv
DEMO = demo
PY = $(VENV)/bin/python

.PHONY: help demo test test-slow test-long test-machines bench gpu-check reproduce clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.installed-plot
	$(PY) benchmarks/demo.py "$(DEMO)"

test: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto -m "not slow"

test-slow: $(VENV)/.installed-test
	$(PY) -m pytest -n auto -m slow

test-machines: $(VENV)/.installed-test
	PYTHON=$(PY) tests/machines.sh

test-long: $(VENV)/.installed-test
	KILLS=100 FUZZ=5000 $(PY) -m pytest tests/test_kill.py tests/test_fuzz.py tests/test_torchrun.py

bench: $(VENV)/.installed
	$(PY) benchmarks/speed.py --json benchmarks/results/speed.json
	$(PY) benchmarks/score_speed.py
	$(PY) benchmarks/scale.py --json benchmarks/results/scale.json

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --json benchmarks/results/gpu.json

reproduce: $(VENV)/.installed-plot
	$(PY) benchmarks/$(if $(filter ablation,$(ROW)),ablation.py,reproduce.py $(ROW)) $(if $(MINUTES),--minutes $(MINUTES)) \
	    $(if $(EXTRA),--extra="$(EXTRA)")

clean:
	rm -rf $(VENV) "$(DEMO)"

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or newer: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-plot: requirements-plot.txt $(VENV)/.installed
	$(PY) -m pip install --quiet -r requirements-plot.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed-plot
	$(PY) -m pip install --quiet -r requirements-test.txt
	touch $@
