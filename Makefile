# make demo and make test do all the set-up that they need; the second time they start at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINS := .ci/constraints.txt
CRD ?= https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_rayjobs.yaml

# Models and data come from local folders here: no library shall look for a hub.
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1

.PHONY: help demo demo-llm check fast test lint browser kuberay docs prove benchmark benchmark-merging benchmark-evaluation benchmark-cluster benchmark-dashboard benchmark-machine benchmark-faults benchmark-models benchmark-selection benchmark-methods-cost benchmark-searches benchmark-systems families ratios gpu pools experts experts-llm clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/.demo ## set up, fetch base and data, search for the best merge of four real classifiers: minutes
	$(BIN)/python configs/demo/prepare_demo.py
	$(BIN)/python evolve.py configs/demo.yaml

demo-llm: $(VENV)/.demo-llm ## the same with a language model of 135M parameters and four LoRA experts: twelve minutes and more
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python evolve.py configs/demo-llm.yaml

check: $(VENV)/.dev ## style, types and the fast tests: a minute
	$(MAKE) --no-print-directory -j2 lint fast

fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not whole" -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev lint ## set up, check style and types, run the tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser: $(VENV)/.dev ## the pages in a real browser; needs Chromium
	EVOLVER_BROWSER=required $(BIN)/python -m pytest tests/test_dashboard.py tests/test_commands.py

kuberay: $(VENV)/.dev ## KubeRay's manifest against the operator's published schema; CRD=file, where GitHub is out of reach
	KUBERAY_CRD=$(CRD) $(BIN)/python -m pytest tests/test_deploy.py

docs: $(VENV)/.dev ## write docs/reference.md, presets.md, commuting.md and the tables of methods-*.md from the code
	$(BIN)/python -m evolver.commands.reference > docs/reference.md
	$(BIN)/python -m evolver.commands.reference presets > docs/presets.md
	$(BIN)/python tests/commuting.py > docs/commuting.md
	$(BIN)/python tests/method_pages.py

prove: $(VENV)/.dev ## the slow proofs: kills by the dozen, nodes that are cut off and lost, two machines by hand, the language model's demo; FUSION_BENCH=folder-with-fusion_bench compares methods with it, too
	EVOLVER_KILLS=20 $(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m pytest -m slow tests
	$(if $(FUSION_BENCH),PYTHONPATH=$(FUSION_BENCH) $(BIN)/python -m pytest tests/oracles/test_fusion_bench.py)

benchmark: $(VENV)/.dev ## the figures of results/benchmarks/, measured on this machine
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python tests/benchmarks/main_job.py

benchmark-merging: $(VENV)/.dev ## merging against the copy; MERGEKIT=path-of-mergekit-yaml compares with mergekit, too
	$(BIN)/python tests/benchmarks/merging.py --memory $(if $(MERGEKIT),--mergekit $(MERGEKIT))

benchmark-evaluation: $(VENV)/.dev ## scoring against bare forward passes and lm-eval; PEER=environment-of-mergekit-evolve compares searches, too
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python tests/benchmarks/evaluation.py $(if $(PEER),--peer $(PEER))

benchmark-cluster: $(VENV)/.dev ## what a cluster costs and is worth: simulated workers, real ones, a hundred kills
	$(BIN)/python tests/benchmarks/cluster.py

benchmark-lineages: $(VENV)/.dev ## bytes of ledger and messages for long lineages; BEFORE=times-of-other-code compares with them
	$(BIN)/python tests/benchmarks/lineages.py $(if $(BEFORE),--before $(BEFORE))

benchmark-dashboard: $(VENV)/.dev ## what the dashboard takes of a hundred thousand candidates; needs Chromium
	$(BIN)/python tests/benchmarks/dashboard.py

benchmark-faults: $(VENV)/.dev ## thousands of wrong inputs, and how they are answered
	$(BIN)/python tests/benchmarks/faults.py

benchmark-machine: $(VENV)/.dev ## the main job, first use, tests and merging on any machine; MERGEKIT=path-of-mergekit-yaml
	$(BIN)/python configs/demo/prepare_demo.py
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python tests/benchmarks/any_machine.py $(if $(MERGEKIT),--mergekit $(MERGEKIT))

benchmark-searches: $(VENV)/.dev ## every search at one budget: POOL=emotion-l3 SEEDS=8; hours, goes on where it was stopped
	$(BIN)/python tests/benchmarks/searches.py $(if $(POOL),--pool $(POOL)) $(if $(SEEDS),--seeds $(SEEDS))

benchmark-systems: $(VENV)/.dev ## every merge method at five masses and tuned: POOL=emotion-l3 SEEDS=3; hours, goes on where it was stopped
	$(BIN)/python tests/benchmarks/systems.py $(if $(POOL),--pool $(POOL)) $(if $(SEEDS),--seeds $(SEEDS))

benchmark-selection: $(VENV)/.dev ## rules for choosing among merges, played on the tables of answers in results/tables
	$(BIN)/python tests/benchmarks/selection.py

benchmark-methods-cost: $(VENV)/.dev ## seconds and memory of every merge method beside a copy and torch's decompositions; LARGE=1 on 3 GB
	$(BIN)/python tests/benchmarks/methods_cost.py $(if $(LARGE),--large)

families: $(VENV)/.dev ## try every architecture with tiny models, as a user would, and write docs/models.md: ten minutes
	$(BIN)/python tests/benchmarks/models.py

benchmark-models: $(VENV)/.dev ## the same, and what checking large checkpoints and merging mixtures of experts cost
	$(BIN)/python tests/benchmarks/models.py --figures $(if $(BEFORE),--before $(BEFORE))

ratios: $(VENV)/.dev ## speed and memory as ratios to copies of the same bytes, against the kept ones; WRITE=1 keeps these
	$(BIN)/python tests/benchmarks/ratios.py $(if $(WRITE),--write)

gpu: $(VENV)/.dev ## what offspring and scoring cost on a GPU, and whether the bits are the CPU's; PYTHON_GPU=python-with-CUDA-torch
	$(or $(PYTHON_GPU),$(BIN)/python) tests/benchmarks/gpu.py

pools: $(VENV)/.dev ## train the expert pools of tests and benchmarks: make pools DATA=folder-with-the-raw-sets
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python configs/pools/prepare_pools.py --data $(DATA)
	for pool in configs/pools/*.yaml; do $(BIN)/evolver experts $$pool || exit; done
	$(BIN)/python configs/pools/figures.py

experts: $(VENV)/.dev ## train the demo's experts anew
	$(BIN)/python configs/demo/prepare_demo.py
	$(BIN)/python configs/demo/make_experts.py

experts-llm: $(VENV)/.dev ## train the experts of demo-llm anew: make experts-llm DATA=folder-with-the-training-sets
	$(BIN)/python configs/demo-llm/prepare_llm.py
	$(BIN)/python configs/demo-llm/train_experts.py --data $(DATA)

clean: ## remove the environment; runs and caches stay
	rm -rf $(VENV)

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=26'
	@touch $@

# torch first and by its exact version: asked for by a range, it could pull gigabytes of GPU libraries.
$(VENV)/.torch: $(VENV)/.pip $(PINS)
	$(BIN)/pip install --quiet "$$(grep '^torch==' $(PINS))"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[demo]'
	@touch $@

$(VENV)/.demo-llm: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[demo-llm]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.demo-llm
