# make demo: the whole method on drawn shapes, on a CPU. make test: the tests. make lint: the formatter
# and linter. make experiment: docs/results.md's figures on CIFAR-10, hours; IMAGES=DIR if it is at hand.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test quick lint trajectory experiment clean

.venv: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade -r requirements.txt
	touch .venv

.venv/dev: requirements-dev.txt | .venv
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch .venv/dev

demo: .venv .venv/dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash experiments/demo/demo.sh

lint: .venv .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

FIRST = tests/test_faults.py tests/test_silent.py tests/test_errors.py

test: .venv .venv/dev
	@# two halves side by side: a process trains on one core
	@$(PY) -m pytest -q tests $(FIRST:%=--ignore=%) >.others.log 2>&1 & others=$$!; \
	$(PY) -m pytest -q $(FIRST); status=$$?; \
	wait $$others || status=1; cat .others.log; exit $$status

experiment: .venv .venv/dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash experiments/cifar10/cifar10.sh

clean:
	rm -rf out data

trajectory: .venv .venv/dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash experiments/machine/trajectory.sh $(BASE)
