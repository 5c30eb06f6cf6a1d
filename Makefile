PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMFYUI_VENV := .venv-comfyui/$(notdir $(abspath $(COMFYUI_DIR)))
# Built for CUDA, and not needed: without them torchaudio is what it has in Python.
TORCHAUDIO_LIBRARIES := $(COMFYUI_VENV)/lib/python*/site-packages/torchaudio/lib/*.so
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: demo test fuzz faults soak restarts test-comfyui bench parity models simulate simulate-users wheels-gpu test-gpu bench-gpu lint clean

demo: $(VENV)/.ready
	$(BIN)/python -m comfy_xdit demo

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest

# Bad messages through the bridge, bad headers through every reader; writes docs/reliability.md.
fuzz: $(VENV)/.ready
	$(BIN)/python -m benchmarks.faults.fuzz --messages $(or $(MESSAGES),1000000) --headers $(or $(HEADERS),100000)
	XDIT_FUZZ_EXAMPLES=$(or $(HEADERS),100000) $(BIN)/python -m pytest tests/test_gguf_header.py --timeout 0

# Faults injected for real, and many runs with cancels and kills; both write docs/reliability.md.
faults: $(VENV)/.ready
	$(BIN)/python -m benchmarks.faults

soak: $(VENV)/.ready
	$(BIN)/python -m benchmarks.faults.soak --runs $(or $(RUNS),500)

# A real ComfyUI server ended in mid-run, RUNS times: make restarts COMFYUI_DIR=/path/to/ComfyUI
restarts: $(COMFYUI_VENV)/.ready
	$(COMFYUI_VENV)/bin/python -m benchmarks.faults.restarts "$(COMFYUI_DIR)" --runs $(or $(RUNS),20)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

parity: $(VENV)/.ready
	$(BIN)/python -m benchmarks.parity

# Every model of diffusers folders against plain diffusers; writes docs/models.md, as test-comfyui does.
models: $(VENV)/.ready
	XDIT_MODELS_PAGE="$(CURDIR)/docs/models.md" $(BIN)/python -m pytest tests/test_folders.py

# The planner on described clusters against published latencies; writes docs/planner.md.
simulate: $(VENV)/.ready
	$(BIN)/python -m benchmarks.simulation

# Many users on many GPUs, by discrete events; writes docs/scale.md. No rank is started.
simulate-users: $(VENV)/.ready
	$(BIN)/python -m benchmarks.users

# All of it, about 20 minutes on two idle cores; some of it: make bench PARTS="seam twin"
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks $(PARTS)

# What a machine with a GPU and no network lacks, into .whl; then, there, each in under 10 minutes
# (docs/gpu.md). XDIT_GPU_TESTS=cpu tests on CPU ranks what is the same code.
wheels-gpu:
	$(PYTHON) scripts/gpu_wheels.py

test-gpu:
	PYTHON=$(PYTHON) bash scripts/gpu.sh test

bench-gpu:
	PYTHON=$(PYTHON) bash scripts/gpu.sh bench

# The same pack in a real ComfyUI: make test-comfyui COMFYUI_DIR=/path/to/ComfyUI
# One environment per checkout: each wants its own front end.
test-comfyui: $(COMFYUI_VENV)/.ready
	COMFYUI_DIR="$(COMFYUI_DIR)" XDIT_FAMILIES_PAGE="$(CURDIR)/docs/comfyui-families.md" \
		XDIT_MODELS_PAGE="$(CURDIR)/docs/models.md" XDIT_CHANGES_PAGE="$(CURDIR)/docs/comfyui-changes.md" \
		$(COMFYUI_VENV)/bin/python -m pytest tests/comfyui

# The constraint file pins torch, so that no dependency pulls another build of it.
$(VENV)/.ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) torch
	$(BIN)/pip install $(PIP_FLAGS) --requirement requirements.txt --editable ".[test]"
	touch $@

$(COMFYUI_VENV)/.ready: pyproject.toml requirements.txt constraints.txt
	@test -n "$(COMFYUI_DIR)" || { echo "set COMFYUI_DIR to a ComfyUI checkout"; exit 2; }
	mkdir -p $(COMFYUI_VENV)
	$(PYTHON) -m venv $(COMFYUI_VENV)
	$(COMFYUI_VENV)/bin/pip install $(PIP_FLAGS) torch
	grep -vE '^(torch|torchvision|torchaudio)$$' "$(COMFYUI_DIR)/requirements.txt" > $(COMFYUI_VENV)/comfyui.txt
	$(COMFYUI_VENV)/bin/pip install $(PIP_FLAGS) --requirement $(COMFYUI_VENV)/comfyui.txt requests
	$(COMFYUI_VENV)/bin/pip install $(PIP_FLAGS) --no-deps torchvision torchaudio
	$(COMFYUI_VENV)/bin/python -c "import torchaudio" 2>/dev/null || rm $(TORCHAUDIO_LIBRARIES)
	$(COMFYUI_VENV)/bin/python -c "import torchaudio"
	$(COMFYUI_VENV)/bin/pip install $(PIP_FLAGS) --requirement requirements.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-comfyui .venv-gpu .whl output build *.egg-info
