# make demo: the whole method on drawn shapes, about 10 minutes on 2 CPU cores. make test: the tests. Both make .venv first.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test clean

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

clean:
	rm -rf out data
