# make book      builds the pages from the stored outputs (no torch needed) and checks them
# make pdf       prints the whole book as one PDF (needs a Chromium), and builds the pages with a link to it
# make run       executes the chapters again and stores their outputs
# make test      everything: module, chapters, pages
# make saelens   compares the dictionaries with SAELens, in an environment of its own
# make portable  runs module and chapters again under other kernels (an hour)
# make data      makes the stored artefacts in data/ again (long)
# make bench     times a step against the paper's formulation; leave the machine alone meanwhile

PYTHON ?= python3
BOOK := .venv-book/bin/
TEST := .venv/bin/
STUDIES := tms more_seeds published gated failures unknown residual grid schedules lp attributions attention merging \
           layerwise tricks parallel larger judge tuned fresh bottleneck spd judged leaks whole baselines \
           basis basis_others basis_stream whole_computations modular induction induced groups together \
           architectures digits looking verified grokked each_method irreps fused pieces finds letters one_call \
           dictionaries one_question tied learned_group thresholds
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: book pdf run test saelens portable data bench clean

book: .venv-book/installed
	@$(BOOK)python -m tools.build

pdf: .venv/installed
	@$(TEST)python -m tools.pdf

run: .venv/installed
	$(TEST)python -m tools.execute

test: .venv/installed
	@$(TEST)python -m tools.test_all

saelens: .venv-saelens/installed
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-saelens/bin/python -m pytest -q --noconftest -c /dev/null --rootdir . \
		-p no:cacheprovider tests/saelens/check.py

portable: .venv/installed
	@$(TEST)python -m tools.portable

data: .venv/installed
	@for study in $(STUDIES); do $(TEST)python -m experiments.$$study || exit 1; done
	$(TEST)python -m benchmarks.price

bench: .venv/installed
	OMP_NUM_THREADS=1 $(TEST)python -m benchmarks.run

.venv-book/installed: requirements-docs.txt constraints.txt
	$(PYTHON) -m venv .venv-book
	$(BOOK)python $(INSTALL) -r requirements-docs.txt
	@touch $@

.venv-saelens/installed: tests/saelens/requirements.txt
	$(PYTHON) -m venv .venv-saelens
	.venv-saelens/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv/installed: pyproject.toml requirements-docs.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(TEST)python $(INSTALL) -r requirements-docs.txt -e '.[book,test]'
	@touch $@

clean:
	rm -rf _build .venv-book
