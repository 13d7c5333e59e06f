# make demo: the whole method on drawn shapes, 13 minutes on 2 CPU cores. make test: the tests. Both make .venv first.
# make experiment: the README's figures on CIFAR-10, four hours on 2 CPU cores; IMAGES=DIR if CIFAR-10 is at hand as PNGs.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test experiment clean

.venv: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade -r requirements.txt
	touch .venv

.venv/dev: requirements-dev.txt | .venv
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch .venv/dev

demo: .venv
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/demo.sh

test: .venv .venv/dev
	$(PY) -m pytest -q tests

experiment: .venv .venv/dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/experiment.sh

clean:
	rm -rf out data
