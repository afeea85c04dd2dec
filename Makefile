# make demo, make test and make check need nothing but Python 3.11 or newer: each sets up .venv by itself.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# The one large dependency, for reading PyTorch weights and for parity; a CPU build is enough.
TORCH ?= torch==2.13.0
# Encoders as their authors have them, to compare with; what else these ask for is for training.
REFERENCES := dasheng==0.0.9 efficientnet-pytorch==0.7.1 openbeats==0.1.1 s3prl==0.4.18 hear21passt==0.0.26 panns-hear==0.2.1 torchlibrosa==0.1.0 wav2clip==0.1.0
# MTEB, and what it imports beside the packages that are here; without torchcodec, whose wheels are for CUDA. 275 MB.
MTEB := mteb==2.26.24 polars==2.1.0 polars-runtime-32==2.1.0 pytrec-eval-terrier==0.5.11 sentence-transformers==6.2.0
BIN := .venv/bin

.PHONY: install demo evaluate-demo test test-full test-tpu test-gpu test-hear test-hoplite test-page test-azure bench bench-gpu bench-long bench-collection bench-scale bench-evaluate check format clean

install: .venv/installed

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer as python3; found $$(python3 --version 2>&1)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[av,convert,evaluate,hf,plot,ray,s3,search,tar,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(REFERENCES) $(MTEB)
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/tpu "$$($(BIN)/python -c "$$LIBTPU")" || \
		echo "no libtpu for this machine: what it compiles for TPUs is not tested"
	touch $@

# The TPU's compiler that this JAX asks for (200 MB), beside the packages: among them JAX would look for a TPU at every
# start, and say at length that it finds none.
define LIBTPU
from importlib.metadata import requires
print(next(line.split(";")[0].strip() for line in requires("jax") if line.startswith("libtpu")))
endef
export LIBTPU

demo: install
	$(BIN)/python examples/demo.py

# HEAR tasks made here, CREPE and random weights evaluated on them: some minutes. DIGITS=FOLDER adds two tasks of spoken
# digits, from files named DIGIT_SPEAKER_NUMBER.wav.
evaluate-demo: install
	@{ command -v fluidsynth && command -v espeak-ng; } >/dev/null || $(call debian,fluidsynth timgm6mb-soundfont espeak-ng)
	$(BIN)/python examples/evaluate_demo.py $(if $(DIGITS),--digits "$(DIGITS)")

# What Debian has is installed as root, and named to others.
debian = { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y --no-install-recommends $(1); } || \
	{ echo "expected these packages: apt-get install $(1)"; exit 1; }

# Two processes: most of the time is compiling, which takes one core.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Full-size encoders with random weights, and every system: about 12 GB of memory, and ten minutes or more.
test-full: install
	$(BIN)/python -m pytest -m slow

# The page of gura-jax plot, in a real browser.
test-page: install
	@{ command -v chromium && command -v chromedriver; } >/dev/null || $(call debian,chromium chromium-driver)
	$(BIN)/python -m pytest -m page

# Stores in Azure's blob storage, as its emulator has it; needs npm.
test-azure: install
	npm install --silent --no-audit --no-fund --prefix .venv/azurite azurite@3.35.0
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_azure.py

# Every system at full size by the compilers of accelerators, which need not be here: see docs/accelerators.md. Prints
# seconds of compiling, and GB of weights and batch and of temporaries, of each.
test-tpu: install
	$(BIN)/python -m pytest -m tpu -rP tests/test_compiling.py

test-gpu: .venv-gpu/installed
	.venv-gpu/bin/python -m pytest -m gpu -rP tests/test_compiling.py

# In an environment of its own, as the wheels for CUDA take five gigabytes.
.venv-gpu/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer as python3; found $$(python3 --version 2>&1)"; exit 1; }
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[cuda]' 'pytest>=9.0'
	touch $@

# HEAR's own validator and evaluation kit on every system, in an environment of their own: twenty minutes on two cores.
test-hear: .venv-hear/installed
	.venv-hear/bin/python tests/hear/run.py

# The clients without their dependencies: those ask for NumPy 1.19, which no Python of today has, and for TensorFlow.
.venv-hear/installed: pyproject.toml tests/hear/requirements.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer as python3; found $$(python3 --version 2>&1)"; exit 1; }
	test -x .venv-hear/bin/python || $(PYTHON) -m venv .venv-hear
	.venv-hear/bin/python -m pip install --quiet $(TORCH)
	.venv-hear/bin/python -m pip install --quiet --requirement tests/hear/requirements.txt
	.venv-hear/bin/python -m pip install --quiet --no-deps heareval==2021.1.3 hearvalidator==2021.0.2
	.venv-hear/bin/python -m pip install --quiet --editable '.[convert,hear]'
	touch $@

# Exports to perch-hoplite's database, searched by perch-hoplite: in an environment of its own, as it asks for pandas<3.
test-hoplite: .venv-hoplite/installed
	.venv-hoplite/bin/python -m pytest -m hoplite tests/test_export.py

.venv-hoplite/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer as python3; found $$(python3 --version 2>&1)"; exit 1; }
	test -x .venv-hoplite/bin/python || $(PYTHON) -m venv .venv-hoplite
	.venv-hoplite/bin/python -m pip install --quiet --editable '.[hoplite]' 'pytest>=9.0' 'hypothesis>=6.100'
	touch $@

# Beside PyTorch, with the same weights: an hour or so, 12 GB of memory, 18 GB of disk. Nothing else should run.
bench: install benchmarks/.flax/installed benchmarks/.peers/installed
	$(BIN)/python benchmarks/run.py --out benchmarks/results/cpu
	$(BIN)/python benchmarks/run.py --out benchmarks/results/cpu-peers --systems fusion_wav2vec2 hubert-base crepe-tiny \
		--workloads 4x4 --rounds 7 --peers compile bfloat16 onnx openvino openvino-bfloat16 flax
	$(BIN)/python benchmarks/choices.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/gura-jax convert crepe-full
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/hear_stream.py --out benchmarks/results/cpu-hear.md

# On one GPU beside PyTorch, in eight minutes: needs jax, flax, torch, transformers and numpy in $(PYTHON), nothing else.
bench-gpu:
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer as python3; found $$(python3 --version 2>&1)"; exit 1; }
	$(PYTHON) benchmarks/gpu.py

# Ten minutes of audio through fusion_cat_xwc, whole: about half an hour on two cores.
bench-long: install
	$(BIN)/python benchmarks/long.py --seconds 30 60 600 --plain 30

# gura-jax embed over files, beside the model alone: a quarter of an hour on two cores.
bench-collection: install
	$(BIN)/python benchmarks/collection.py
	$(BIN)/python benchmarks/collection.py crepe-tiny --clips 20000 --rounds 1 --ray

# Ten million clips planned, a million keys listed, 10,000 shards resumed, formats, a bucket beside a disk: ten minutes.
bench-scale: install
	$(BIN)/python benchmarks/scale.py

# Beside HEAR's kit, on the same embeddings: half an hour on two cores.
bench-evaluate: install .venv-hear/installed
	$(BIN)/python benchmarks/evaluate.py --kit .venv-hear/bin/python
	$(BIN)/python benchmarks/evaluate.py --kit .venv-hear/bin/python --clips 20000 --features 3072 --max-epochs 6
	$(BIN)/python tests/hear/tasks.py benchmarks/.tasks
	$(BIN)/python benchmarks/evaluate.py --kit .venv-hear/bin/python --tasks benchmarks/.tasks --seeds 5

# Other runtimes, apart from what is installed: none of them is a dependency.
benchmarks/.peers/installed: benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target benchmarks/.peers --requirement benchmarks/peers.txt
	touch $@

# The last transformers with Flax models, beside the one that is installed.
benchmarks/.flax/installed:
	$(BIN)/python -m pip install --quiet --no-deps --target benchmarks/.flax \
		'transformers==4.57.6' 'huggingface_hub==0.36.2' 'tokenizers==0.22.2'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-gpu .venv-hear .venv-hoplite demo build dist *.egg-info .pytest_cache .ruff_cache
