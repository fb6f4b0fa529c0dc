# `make demo` and `make test` are all that a newcomer needs; `make help` lists the rest. Paths are relative, so that the
# checkout may lie anywhere.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test coverage serve page page-test cloud-check bench gpu-check soak image image-test notebooks lint clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# What Python compiles of .venv is kept there, whatever the shell says: it halves the start of everything after the first.
unexport PYTHONDONTWRITEBYTECODE
PY := .venv/bin/python

DATA ?= scenes
SERVER ?= torchserve
STORE ?= model_store
RUNTIME ?= all
PORT ?= 8080
MANAGEMENT_PORT ?= 8081
METRICS_PORT ?= 8082
TAG ?= fastunet

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## train, transfer, archive, serve and call: DATA=scenes|camvid_tiny|FOLDER ARCH= EPOCHS=
	@$(PY) notebook/run.py 01 02 03 --into model_store -p DATA "$(DATA)" $(if $(ARCH),-p ARCH $(ARCH)) $(if $(EPOCHS),-p EPOCHS $(EPOCHS))

test: .venv/installed ## run the tests, two at a time
	@$(PY) -m pytest -n 2 --dist worksteal

coverage: .venv/installed ## run the tests, and show how much of deployment/ they reach; the floor is in pyproject.toml
	@$(PY) -m pytest -n 2 --dist worksteal --cov

serve: .venv/installed ## serve the archive in STORE on 127.0.0.1: SERVER=torchserve|uvicorn STORE= NAME= PORT= MANAGEMENT_PORT= METRICS_PORT= AUTH=1
	@exec $(PY) -m deployment.serve --server $(SERVER) --model-store "$(STORE)" --port $(PORT) --management-port $(MANAGEMENT_PORT) --metrics-port $(METRICS_PORT) $(if $(NAME),--name "$(NAME)") $(if $(AUTH),--auth)

page: .venv-page/installed ## start a page that asks the running server, and open it where there is a browser: PORT= NAME=, or ENDPOINT= on AI Platform
	@exec .venv-page/bin/python -m space.page http://127.0.0.1:$(PORT)/predictions/$(or $(NAME),fastunet) $(if $(ENDPOINT),--endpoint $(ENDPOINT))

bench: .venv/installed ## measure against peers and the limit: CONTENDERS=baseline,eager,… CLIENTS=1,8 PHOTOS= CALIBRATE=
	@$(PY) -m benchmark.run $(if $(CONTENDERS),--contenders $(CONTENDERS)) $(if $(CLIENTS),--clients $(CLIENTS)) $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(CALIBRATE),--calibrate "$(CALIBRATE)")

gpu-check: ## prove and measure serving on this machine's GPU, in under eight minutes; CPU=1: whether all of it runs, without one
	@$(if $(wildcard .venv/bin/python),$(PY),python3) -m benchmark.gpu $(if $(CPU),--cpu) $(if $(PARTS),--parts "$(PARTS)")

soak: .venv/installed ## the long tests: attacks, malformed requests by the thousand, 15 minutes of load
	@$(PY) -m pytest -m soak -s

page-test: .venv/installed .venv-page/installed ## open the page in a browser and drop photos (Debian: apt install chromium)
	@$(PY) -m pytest -m browser

image: ## build the serving image with docker or podman: RUNTIME=openvino (small), or TORCH_BACKEND=cu126 (GPU), SERVER=uvicorn, BULK=1 (Ray) TAG= NAME=
	@engine=$$(for e in docker podman; do $$e info >/dev/null 2>&1 && echo $$e && break; done); \
	if [ -z "$$engine" ]; then echo "error: neither docker nor podman answers here; cloudbuild.yaml builds in the cloud" >&2; exit 1; fi; \
	BUILDAH_FORMAT=docker $$engine build --build-arg RUNTIME=$(RUNTIME) --build-arg SERVER=$(SERVER) $(if $(TORCH_BACKEND),--build-arg TORCH_BACKEND=$(TORCH_BACKEND)) $(if $(BULK),--build-arg BULK=1) $(if $(NAME),--build-arg NAME=$(NAME)) --tag $(TAG) .

image-test: .venv/installed ## build the same image with buildah, run it, and send it AI Platform requests (root, Debian)
	@$(PY) -m pytest -m image -s

notebooks: .venv/installed ## run all five notebooks, write their outputs into them, and pictures into sample/: DATA=
	@$(PY) notebook/run.py 01 02 03 04 05 -p DATA "$(DATA)" -p RESULTS ../sample

cloud-check: .venv/installed ## run the cloud chapter on Google Cloud, once, for about a dollar: PROJECT= LOCATION= IMAGE= BUCKET=
	@if [ -z "$(PROJECT)" ]; then echo "error: make cloud-check PROJECT=…" >&2; exit 1; fi; \
	$(PY) -m tests.cloud_check $(PROJECT) $(if $(LOCATION),--location $(LOCATION)) $(if $(IMAGE),--image $(IMAGE)) $(if $(BUCKET),--bucket $(BUCKET))

lint: .venv/installed ## check the style and the types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m pyrefly check --min-severity error --output-format min-text

# By name: what else lies there is the reader's. Scenes bear the hash of the code that drew them.
HASH := $(subst x,[0-9a-f],xxxxxxxx)
clean: ## remove what the pipeline wrote; keep the environment, and your own files in data/ and model_store/
	rm -rf data/scenes-$(HASH) data/.scenes-$(HASH)-*
	rm -rf model_store/learner.pkl model_store/learner.part model_store/model-config.yaml model_store/expected_mask.png
	rm -rf model_store/fastunet.* model_store/MODEL_CARD.md model_store/first model_store/0[1-5]_*.ipynb
	rm -rf $(addprefix model_store/sample_,output.txt overlay.jpg pred_mask.png figure.png)
	rm -rf model_store/.export-* model_store/.archive-* model_store/.model-config.yaml.part
	rm -rf .pytest_cache .ruff_cache .hypothesis

# TORCH_BACKEND, from the command line or the environment, chooses PyTorch's build; the default is auto.
.venv/installed: requirements.txt constraints.txt
	@sh install.sh

# Gradio wants an older Pillow than the rest, so the page has an environment of its own.
.venv-page/installed: space/page-requirements.txt | .venv/installed
	@echo "installing into .venv-page"; $(PY) -m venv .venv-page && \
	$(PY) -m uv pip install --quiet --python .venv-page/bin/python -r $< && touch $@
