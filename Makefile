# One line per verb. Every target that needs python needs .venv, and makes it when it is not there.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help env env-vllm repro sweep search sweep-report compare reproduce estimate advise test test-long test-gpu lint ui plots sync params deps pin export verify-export promote publish serve chat synthesize judge lm-eval ladder clean lock

help:  ## what can be typed
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24

env: .venv/installed  ## create .venv with what requirements.lock pins

.venv/installed: requirements.lock pyproject.toml commands/install.py
	$(PYTHON) -m commands.install

env-vllm: env  ## create .venv-llmcompressor, for the export formats compressed_w4a16 and compressed_w8a8
	python -m commands.env_vllm

repro: env  ## run the pipeline: only what is not up to date
	@python -m commands.differences
	dvc repro

test: env  ## the tests, offline, on the CPU, without lint; minutes
	pytest -q

test-long: env  ## the tests marked slow; up to an hour
	pytest -q -m slow

test-gpu: env  ## the tests that need a CUDA device
	pytest -q -m gpu

lint: env  ## ruff and mypy
	ruff check . && ruff format --check . && mypy stages commands

ui: sync  ## MLflow on http://127.0.0.1:5000
	python -m commands.ui

plots: env .dvc/plots/node_modules  ## draw the plots as a page: dvc_plots/index.html; needs npm
	dvc plots show

.dvc/plots/node_modules: .dvc/plots/package.json
	npm install --silent --no-audit --no-fund --prefix .dvc/plots
	touch $@

sync: env  ## bring every DVC experiment into MLflow
	python -m commands.sync

params: env  ## write the composed defaults of conf/ to params.yaml
	python -m commands.params

deps: env  ## write into dvc.yaml which modules each stage imports
	python -m commands.deps

pin: env  ## resolve base_model.revision: null to a commit, once: make pin MODEL=qwen3_0_6b
	python -m commands.pin $(MODEL)

define needs_sweep
@test -n "$(SWEEP)" || { echo "$(1): found no SWEEP, expected a file of conf/sweep ($(filter-out none,$(basename $(notdir $(wildcard conf/sweep/*.yaml))))): make $(1) SWEEP=<file>" >&2; exit 2; }
endef

sweep: env  ## run the points of a sweep that are missing: make sweep SWEEP=<file of conf/sweep> [J=2]
	$(call needs_sweep,sweep)
	@python -m commands.sweep $(SWEEP) $(if $(J),--workers $(J)) $(ARGS)

search: env  ## let Optuna propose the points of a sweep: make search SWEEP=<file of conf/sweep> [J=2]
	$(call needs_sweep,search)
	@python -m commands.search $(SWEEP) $(if $(J),--workers $(J)) $(ARGS)

export: env  ## merge and export the chosen experiment: make export EXP=<name>
	@test -n "$(EXP)" || { echo "export: found no EXP, expected a name that \`dvc exp list\` shows: make export EXP=<name>" >&2; exit 2; }
	dvc exp apply $(EXP)
	DVC_EXP_NAME=$(EXP) dvc repro

verify-export: env  ## hold an exported folder to its manifest: make verify-export [DIR=models/export]
	@python -m commands.verify_export $(if $(DIR),"$(DIR)")

promote: env  ## a copy of the export into MLflow's model registry; champion when it is better: make promote [EXP=<name>]
	@python -m commands.promote $(if $(EXP),--exp "$(EXP)") $(if $(NAME),--name "$(NAME)") $(if $(TO),--to "$(TO)") $(ARGS)

publish: env  ## what an upload to the Hugging Face hub would send: make publish REPO=owner/name DIR=promoted/... [DRY=0]
	@python -m commands.publish $(if $(REPO),--repo "$(REPO)") $(if $(DIR),"$(DIR)") $(if $(filter 0,$(DRY)),--upload) $(if $(PUBLIC),--public) $(ARGS)

synthesize: env  ## new rows from given ones: make synthesize SEEDS=... OUT=... MODEL=... N=... URL=...
	python -m commands.synthesize $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(OUT),--out "$(OUT)") \
		$(if $(MODEL),--model "$(MODEL)") $(if $(N),--rows "$(N)") $(if $(URL),--url "$(URL)") \
		$(if $(GGUF),--gguf "$(GGUF)") $(ARGS)

judge: env  ## a language model rates pairs of answers: make judge MODEL=... URL=...
	python -m commands.judge $(if $(MODEL),--model "$(MODEL)") $(if $(URL),--url "$(URL)") $(if $(GGUF),--gguf "$(GGUF)") $(ARGS)

lm-eval: env  ## the test split scored by lm-eval too, beside evaluate's figures (an extra: pyproject's `eval`)
	python -m commands.lm_eval $(ARGS)

compare: env  ## what distinguishes two experiments, and whether B is better: make compare A=<name> B=<name>
	@test -n "$(A)" -a -n "$(B)" || { echo "compare: found A=$(A) B=$(B), expected names that \`dvc exp list\` shows: make compare A=<name> B=<name>" >&2; exit 2; }
	@python -m commands.compare "$(A)" "$(B)"

sweep-report: env  ## what a sweep answers, with its noise, as a page: make sweep-report SWEEP=<id> [METRIC=<task/measure>] [OUT=<file>]
	@test -n "$(SWEEP)" || { echo "sweep-report: found no SWEEP, expected the sweep.id of experiments: make sweep-report SWEEP=<id>" >&2; exit 2; }
	@python -m commands.sweep_report "$(SWEEP)" $(if $(METRIC),--metric "$(METRIC)") $(if $(OUT),--out "$(OUT)")

ladder: env  ## draw what each exported file keeps of the trained model: runs/ladder.html
	python -m commands.ladder

serve: env  ## OpenAI-compatible server, of the best GGUF or of adapters: make serve PORT=... ADAPTERS="a=models/adapter b=..."
	@exec python -m commands.serve $(if $(GGUF),--gguf "$(GGUF)") $(if $(ADAPTERS),--adapters $(ADAPTERS)) \
		$(if $(PORT),--port "$(PORT)") $(ARGS)

chat: env  ## talk to base and tuned side by side: make chat, or make chat URL=... MODELS="a b"
	@exec python -m commands.chat $(if $(URL),--url "$(URL)") $(if $(MODELS),--models $(MODELS)) $(ARGS)

estimate: env  ## parameters, memory, time, cost before a run: make estimate [ARGS="lora.r=8 --device rtx_4090 --price 0.4"]
	@python -m commands.estimate $(ARGS)

advise: env  ## prompt, retrieve or fine-tune? by the data and the base's scores: make advise [ARGS="--changing TASK"]
	@python -m commands.advise $(ARGS)

reproduce: env  ## run an experiment again in a clean clone, compare every hash: make reproduce RUN=<name, commit or MLflow run id>
	@test -n "$(RUN)" || { echo "reproduce: found no RUN, expected a name that \`dvc exp list\` shows, a commit or an MLflow run id: make reproduce RUN=<name>" >&2; exit 2; }
	@python -m commands.reproduce $(if $(RUN),"$(RUN)") $(ARGS)

clean: env  ## remove what can be made again: DVC's cache of unused outputs, temporary runs
	python -m commands.clean

lock: env  ## renew requirements.lock from pyproject.toml
	uv pip compile -q --no-header --no-annotate --python-version 3.11 --extra dev --extra ray --extra search --extra eval --extra sbom --extra serve --extra onnx pyproject.toml -o requirements.lock
	printf 'llmcompressor==0.14.0.1\ntorch==2.13.0\n' | uv pip compile -q --no-header --no-annotate --python-version 3.11 - -o requirements-llmcompressor.lock
