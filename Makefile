# Everything from a bare clone: `make bench` measures, `make test` proves, `make train` trains. Each sets up its own .venv
# first.
#
#   make bench TORCH=system   use the PyTorch (and GPU) already installed for $(PYTHON) instead of a pinned CPU build
#   make test PIP_ARGS="..."  pass arguments to every pip install, for example the index your PyTorch builds come from

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
PIP_ARGS ?=
BENCH_ARGS ?=
RECIPE ?= digits
TRAIN_ARGS ?=
CAMPAIGN_ARGS ?=
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip --disable-pip-version-check install $(PIP_ARGS)
PIP = $(INSTALL) --quiet

.DELETE_ON_ERROR:
.PHONY: bench test campaign demo train docs lint build sanitize cuda-build gpu-check clean

bench: build
	$(RUN) bench/run.py $(BENCH_ARGS)

# One worker a core, one thread a worker: most of the suite is single-threaded. A worker that a test took down is not
# replaced: the replacement would begin with that test again.
TEST_ARGS ?= --numprocesses auto --dist loadfile --max-worker-restart 0
test: build
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(TEST_ARGS)

# Looks for broken promises at random; docs/reliability.md has the table of the last run.
MINUTES ?= 30
SEED ?= 0
campaign: build
	OMP_NUM_THREADS=1 $(RUN) scripts/campaign.py --minutes $(MINUTES) --seed $(SEED) $(CAMPAIGN_ARGS)

demo: build
	$(RUN) examples/digits.py

# A recipe of the package, or RECIPE=path/to/mine.yaml; TRAIN_ARGS overrides settings. Started again, it goes on.
train: build
	$(RUN) -m frskd_fast.training fit --config $(RECIPE) $(TRAIN_ARGS)

# The site, in build/docs/index.html. A warning is an error, and so is a reference that leads nowhere. The package is read,
# not compiled.
docs: $(VENV)/.docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -d build/docs/.doctrees docs build/docs
	@echo "The site is in build/docs/index.html"

lint: build
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(RUN) bench/report.py --readme README.md --docs docs/benchmarks.md --methods docs/methods/index.md --check

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, fed hostile arguments and odd sizes.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
# libstdc++ must be there before the sanitizer looks for the function that throws exceptions.
SANITIZER_RUNTIME = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so.6)
SANITIZED = $(abspath $(VENV))/bin/pytest -q -p no:cacheprovider
# What has kernels for AVX-512 is run with those for AVX2, too.
sanitize: build
	FRSKD_FAST_BUILD=cpu CXXFLAGS="$(SANITIZE) -O1 -g1" LDFLAGS="$(SANITIZE)" \
	  $(RUN) setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	cd tests && LD_PRELOAD=$(SANITIZER_RUNTIME) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=../build/sanitize/lib FRSKD_FAST_SANITIZED=1 \
	  sh -c '$(SANITIZED) test_entry_points.py test_sanitized.py && FRSKD_FAST_CPU=avx2 $(SANITIZED) test_sanitized.py -k "logit or channel"'

# Compiles every CUDA source, warnings as errors; needs nvcc, but neither a GPU nor a CUDA build of PyTorch. The objects lie
# beside those of `build`, so that the CPU kernels are not compiled again where they were compiled with the same flags.
cuda-build: $(VENV)/.packages
	FRSKD_FAST_BUILD=cuda FRSKD_FAST_WERROR=1 $(RUN) setup.py --quiet build_ext --build-temp build --build-lib build/cuda-check

# For a machine with a GPU and a CUDA build of PyTorch: no network and no .venv. See scripts/gpu_check.py --help.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

build: $(VENV)/.built

$(VENV)/.torch:
ifeq ($(TORCH),system)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(RUN) -c "import torch; print('using the installed PyTorch', torch.__version__)"
else
	@echo "Setting up $(VENV) with PyTorch $(TORCH) (once, about two minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$(TORCH)" numpy
endif
	touch $@

# The constraint keeps pip from replacing the PyTorch chosen above while it resolves the other packages.
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(RUN) -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/constraints.txt
	$(RUN) scripts/requirements.py dev demo train onnx > $(VENV)/requirements.txt
	$(PIP) --constraint $(VENV)/constraints.txt --requirement $(VENV)/requirements.txt
ifneq ($(TORCH),system)
	-$(PIP) --constraint $(VENV)/constraints.txt --no-deps "triton>=3.6,<3.7"
endif
	touch $@

$(VENV)/.docs: $(VENV)/.packages
	$(RUN) scripts/requirements.py docs > $(VENV)/requirements-docs.txt
	$(PIP) --constraint $(VENV)/constraints.txt --requirement $(VENV)/requirements-docs.txt
	touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(shell find csrc -type f)
	@echo "Building frskd_fast"
	$(INSTALL) --verbose --no-build-isolation --no-deps --editable . > $(VENV)/build.log 2>&1 || (cat $(VENV)/build.log; false)
	@grep -E "^ *frskd_fast: (building|compiling)" $(VENV)/build.log || true
	$(RUN) -c "import frskd_fast"
	touch $@

clean:
	rm -rf build dist .venv *.egg-info frskd_fast/*.so
