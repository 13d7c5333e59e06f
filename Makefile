# make toy: the method on points, in seconds. make demo: the whole method on drawn figures, in
# minutes, on a CPU. make compare: stage 2 beside vanilla SiT on them, four seeds of each. make test:
# the tests; make quick: the half minute of them for an edit loop. make lint: the formatter and
# linter. make trajectory BASE=REVISION: 50 steps of both stages, byte for byte. make experiment:
# docs/results.md's figures on CIFAR-10, in hours; IMAGES=DIR if the images are at hand.
PYTHON ?= python3
PY = .venv/bin/python
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: toy demo compare test quick lint trajectory experiment clean

# A target of each is a file that is made last, so that an installation that failed is begun again
.venv/run: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --upgrade -r requirements.txt
	touch .venv/run

.venv/demo: requirements-demo.txt .venv/run
	$(PY) -m pip install --quiet -r requirements-demo.txt
	touch .venv/demo

.venv/dev: requirements-dev.txt requirements-demo.txt .venv/run
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch .venv/dev

toy: .venv/demo
	@$(PY) -m experiments.demo.toy

demo: .venv/demo
	@$(IN_VENV) bash experiments/demo/demo.sh

compare: .venv/demo
	@$(IN_VENV) bash experiments/demo/compare.sh

lint: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# Two halves side by side, because a process trains on one core. In the first is what asks for
# conftest's runs, which are so trained once; whatever is new is in the second.
NAMES = build_teacher common continue counterparts docs experiments image_folders inputs losses \
    models refusals sample train
FIRST = $(NAMES:%=tests/test_%.py)

test: .venv/dev
	@$(PY) -m pytest -q tests $(FIRST:%=--ignore=%) >.others.log 2>&1 & others=$$!; \
	$(PY) -m pytest -q $(FIRST); status=$$?; \
	wait $$others || status=1; cat .others.log; exit $$status

quick: .venv/dev
	@$(PY) -m pytest -q -m quick tests

trajectory: .venv/run
	@$(IN_VENV) bash experiments/machine/trajectory.sh $(BASE)

experiment: .venv/demo
	@$(IN_VENV) bash experiments/cifar10/cifar10.sh

clean:
	rm -rf out data
