# make demo          environment, install, and the whole demo: runs/demo/report.html
# make demo-data     video files through every stage on tiny random weights; CLIPS=DIR: real ones (docs/data.md)
# make test          environment, install, and the whole suite
# make test-latest   what depends on versions, on Python 3.12 or later with the newest ones
# make test-lowest   the same on the lowest versions that requirements.txt allows
# make test-jobs     commands that are stopped, killed, in buckets, on a Ray cluster
# make test-full     all of these, and the long checks
# make reliability   kills, damaged files and failing systems, up to half an hour; SEED=1: other ones
# make lint          ruff, and mypy on the seams
# make wheel         a wheel in an empty environment: prepares and trains the smallest run from an empty folder
# make ratios        PyTorch and JAX at the same work on this CPU, in turns: two minutes
# make bench-gpu     ten minutes on one GPU: every figure of docs/benchmarks.md, to OUT=DIR; installs nothing
# make install       the environment alone, in .venv/

# The first of these that runs and is new enough; pyenv keeps versions that are not on the path.
CANDIDATES := python3.11 python3.12 python3.13 python3 $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.1[1-9].*/bin/python)
find = $(shell for p in $(CANDIDATES); do $$p -c "import sys; sys.exit(sys.version_info < $(1))" 2>/dev/null && echo $$p && break; done)
PYTHON ?= $(call find,(3, 11))
PYTHON_LATEST ?= $(call find,(3, 12))
VENV := .venv
LATEST := .venv-latest
LOWEST := .venv-lowest
WHEEL := $(CURDIR)/.venv-wheel
RUN := $(VENV)/bin/python
JOBS := -m "jobs and not slow"
# A test that hangs ends its process, which prints where it was; the others go on in a new one.
PYTEST := -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder --timeout=900 --timeout-method=thread
# What depends on the versions of jax, flax, optax, orbax, grain and transformers.
VERSIONS := $(foreach name,cli checkpoints cogvideox_run loader net optim parallel prepare records sample storage \
	text train wan workdir,tests/$(name)_test.py)
# The TPU's compiler, for the tests of prophy_jax.plan, in the version that jax names. It is installed
# apart: next to jax, it would make every command look for a TPU first.
LIBTPU := import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))

.PHONY: install test test-jobs test-latest test-lowest test-full reliability lint demo demo-data wheel ratios bench-gpu clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install -q -e ".[test]"
	$(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/tpu "$$($(RUN) -c '$(LIBTPU)')"
	touch $@

# After the tests' packages, which pin the versions of these on Python 3.11.
$(VENV)/.installed-demo-data: $(VENV)/.installed-test
	$(RUN) -m pip install -q -e ".[demo]"
	touch $@

test: $(VENV)/.installed-test lint
	PYTHONPATH=$(CURDIR)/$(VENV)/tpu $(RUN) $(PYTEST)

test-jobs: $(VENV)/.installed-test
	PYTHONPATH=$(CURDIR)/$(VENV)/tpu $(RUN) $(PYTEST) $(JOBS) || { \
		echo "what failed is tried again, one at a time: some of these need a machine that is not too slow"; \
		PYTHONPATH=$(CURDIR)/$(VENV)/tpu $(RUN) -m pytest -q -rs --timeout=900 --timeout-method=thread $(JOBS) --last-failed --last-failed-no-failures none; }

test-full: $(VENV)/.installed-test
	PYTHONPATH=$(CURDIR)/$(VENV)/tpu $(RUN) $(PYTEST) --timeout=7200 -m "slow or not slow or jobs"

SEED := 0
reliability: $(VENV)/.installed-test
	$(RUN) -m tests.reliability --seed=$(SEED)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-latest: $(LATEST)/.installed
	PYTHONPATH=$(CURDIR)/$(LATEST)/tpu $(LATEST)/bin/python $(PYTEST) $(VERSIONS)
	PYTHONPATH=$(CURDIR)/$(LATEST)/tpu $(LATEST)/bin/python $(PYTEST) $(JOBS) tests/distributed_test.py

$(LATEST)/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON_LATEST)" || { echo "no Python 3.12 or later found: make PYTHON_LATEST=/path/to/python"; exit 1; }
	$(PYTHON_LATEST) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install -q --upgrade pip
	$(LATEST)/bin/python -m pip install -q -e ".[test]"
	$(LATEST)/bin/python -m pip install -q --no-deps --upgrade --target $(LATEST)/tpu "$$($(LATEST)/bin/python -c '$(LIBTPU)')"
	touch $@

# On Python 3.11, the lowest that is supported: of each package that requirements.txt names, its lower bound.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(PYTEST) $(VERSIONS)

$(LOWEST)/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(LOWEST)
	sed -n 's/^\([^#>]*\)>=\([^, ]*\).*/\1==\2/p' requirements.txt > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -r $(LOWEST)/lowest.txt "pytest>=8" "pytest-timeout>=2.4" "pytest-xdist>=3.7"
	$(LOWEST)/bin/python -m pip install -q --no-deps -e .
	touch $@

# What a user without a checkout has. The folder build/ would bring files into the wheel that are gone by now.
wheel:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: make PYTHON=/path/to/python"; exit 1; }
	rm -rf $(WHEEL) build
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel -q --no-deps --wheel-dir $(WHEEL) .
	rm -rf build
	$(WHEEL)/bin/python -m pip install -q $(WHEEL)/prophy_jax-*.whl
	mkdir $(WHEEL)/empty
	cd $(WHEEL)/empty && env -u PYTHONPATH ../bin/python -m prophy_jax.prepare --config=configs/wan.py:tiny
	cd $(WHEEL)/empty && env -u PYTHONPATH ../bin/python -m prophy_jax.train --config=configs/wan.py:tiny \
		--config.steps=4 --workdir=run
	test -e $(WHEEL)/empty/run/branch/manifest.json

# On a CPU: keep freed memory instead of faulting it in again every step, one simulated device per core.
demo: export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1
demo: export XLA_FLAGS += --xla_force_host_platform_device_count=2
demo: $(VENV)/.installed
	$(RUN) -m prophy_jax.prepare --config=configs/wan.py:demo
	$(RUN) -m prophy_jax.train --config=configs/wan.py:demo_backbone --workdir=runs/demo_backbone
	$(RUN) -m prophy_jax.train --config=configs/wan.py:demo --workdir=runs/demo
	$(RUN) -m prophy_jax.evaluate --config=configs/wan.py:demo --workdir=runs/demo

ratios: $(VENV)/.installed-test
	$(RUN) -m benchmarks.peer --rounds=2
	$(RUN) -m benchmarks.peer --shapes=tiny --work=sample --cores=2 --rounds=2

# With the python3 that is there, which has jax for the GPU.
bench-gpu:
	python3 -m benchmarks.gpu

# The walk-through of docs/data.md, with random weights in place of the public ones.
DEMO := runs/demo-data
WISA := $(if $(CLIPS),$(CLIPS)/wisa_sample,$(DEMO)/clips/wisa)
CAPTIONED := $(DEMO)/$(if $(CLIPS),captioned,clips/captioned)
demo-data: CONFIG := --config=configs/wan.py:demo_data
demo-data: $(VENV)/.installed-demo-data
ifdef CLIPS
	@test -d $(WISA) || { echo "no clips at $(WISA): see docs/data.md"; exit 1; }
	mkdir -p $(CAPTIONED)
	cp -r $(CLIPS)/videophy2_examples/videos docs/demo_clips.csv $(CAPTIONED)/
else
	test -e $(CAPTIONED)/clips.csv || $(RUN) -m prophy_jax.testing.clips $(DEMO)/clips
endif
	test -e $(DEMO)/public || $(RUN) -m tests.tiny_models $(DEMO)/public
	test -e checkpoints/demo-data || $(RUN) -m convert.wan --src=$(DEMO)/public/Wan2.1 --dst=checkpoints/demo-data
	$(RUN) -m prophy_jax.prepare $(CONFIG) --source=$(WISA) --source=$(CAPTIONED)
	$(RUN) -m prophy_jax.label $(CONFIG) --vlm=$(DEMO)/public/Qwen2.5-VL
	$(RUN) -m prophy_jax.label $(CONFIG) --vlm=$(DEMO)/public/Qwen2.5-VL --preview=3
	$(RUN) -m prophy_jax.label $(CONFIG) --vlm=$(DEMO)/public/Qwen2.5-VL --check
	$(RUN) -m prophy_jax.train $(CONFIG) --workdir=$(DEMO)/run

clean:
	rm -rf data/demo runs/demo runs/demo_backbone data/demo-data data/demo-data-labels checkpoints/demo-data $(DEMO)
