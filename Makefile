# make book      builds the pages from the stored outputs (no torch needed) and checks them
# make run       executes the chapters again and stores their outputs
# make test      everything: module, chapters, pages
# make portable  runs module and chapters again under other kernels (an hour)
# make data      makes the stored artefacts in data/ again (long)
# make bench     times a step against the paper's formulation; leave the machine alone meanwhile

PYTHON ?= python3
BOOK := .venv-book/bin/
TEST := .venv/bin/
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: book run test portable data bench clean

book: .venv-book/installed
	@$(BOOK)python -m tools.build

run: .venv/installed
	$(TEST)python -m tools.execute

test: .venv/installed
	@$(TEST)python -m tools.test_all

portable: .venv/installed
	@$(TEST)python -m tools.portable

data: .venv/installed
	$(TEST)python -m experiments.tms
	$(TEST)python -m experiments.gated
	$(TEST)python -m experiments.failures
	$(TEST)python -m experiments.residual
	$(TEST)python -m experiments.grid
	$(TEST)python -m experiments.lp
	$(TEST)python -m experiments.attributions
	$(TEST)python -m experiments.merging
	$(TEST)python -m experiments.layerwise
	$(TEST)python -m benchmarks.price
	$(TEST)python -m experiments.tricks
	$(TEST)python -m experiments.parallel
	$(TEST)python -m experiments.larger

bench: .venv/installed
	OMP_NUM_THREADS=1 $(TEST)python -m benchmarks.run

.venv-book/installed: requirements-docs.txt constraints.txt
	$(PYTHON) -m venv .venv-book
	$(BOOK)python $(INSTALL) -r requirements-docs.txt
	@touch $@

.venv/installed: pyproject.toml requirements-docs.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(TEST)python $(INSTALL) -r requirements-docs.txt -e '.[book,test]'
	@touch $@

clean:
	rm -rf _build .venv-book
