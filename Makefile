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
	@$(BOOK)python tools/build.py

run: .venv/installed
	$(TEST)python tools/execute.py

test: .venv/installed
	@$(TEST)python tools/test_all.py

portable: .venv/installed
	@$(TEST)python tools/portable.py

data: .venv/installed
	$(TEST)python tools/remake_data.py
	$(TEST)python tools/remake_gated.py
	$(TEST)python tools/remake_failures.py
	$(TEST)python tools/remake_residual.py
	$(TEST)python tools/remake_grid.py
	$(TEST)python tools/remake_lp.py
	$(TEST)python tools/remake_attributions.py
	$(TEST)python tools/remake_merging.py
	$(TEST)python tools/remake_layerwise.py
	$(TEST)python benchmarks/price.py
	$(TEST)python tools/remake_tricks.py
	$(TEST)python tools/remake_parallel.py
	$(TEST)python tools/remake_larger.py

bench: .venv/installed
	OMP_NUM_THREADS=1 $(TEST)python benchmarks/run.py

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
