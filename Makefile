# make quickstart   install, then watch a rank-1 adapter learn; ARGS="--seed 1" and the like are passed on
# make test         install, then lint, types and the whole suite
# make fuzz         10,000 malformed requests, bent protobuf and the OpenAPI document against a real server; about 10 minutes
# make gym          every task of reasoning-gym through env check, PROBLEMS=16 of each tried by the base; about 20 minutes
# make acceptance  the public clients of Tinker and OpenAI, unmodified, against a real server; ARGS="--more --json FILE"; about 15 minutes
# make bridges      the bridges to verifiers and OpenEnv with the real packages, each in an environment under .bench; about 20 minutes
# make seeds        the quickstart on seeds 0-4 -> docs/results.md
# make interference three behaviours alone and stacked on each other's tasks -> docs/results.md
# make environments  the recipe of every environment on seeds 0-2 -> docs/results.md; about forty minutes on two cores
# make studies      claims about low rank, as runs with a verdict -> docs/studies, docs/article.md; some hours on two cores
# make bench        every benchmark beside its peers -> benchmarks/RESULTS.md; about an hour on two cores
# make narrow       pretrain a base half as wide as nano -> build/narrow; half an hour of a core
# make rates        what veneer plan says of learning rates beside swept ones, on nano and on that -> docs/plan.md; about an hour of a core
# make nano         pretrain the bundled base anew and measure its card
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint types fuzz gym acceptance bridges seeds interference environments studies bench narrow rates nano clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/veneer quickstart $(ARGS)

test: install lint types
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/basedpyright

fuzz: install
	VENEER_FUZZ=10000 $(BIN)/python -m pytest -n 0 -s tests/server/test_malformed.py tests/server/test_protobuf.py tests/server/test_schema.py

gym: install
	VENEER_GYM=$(or $(PROBLEMS),16) $(BIN)/python -m pytest -n 0 -s tests/envs/test_reasoning.py -k env_check

acceptance: install
	$(BIN)/python tests/acceptance/run.py $(ARGS)

bridges: install
	$(BIN)/python tests/envs/bridges/real.py $(ARGS)

environments: install
	$(BIN)/python recipes/environment_seeds.py

studies: install
	$(BIN)/python recipes/studies.py $(ARGS)

bench: install
	for name in rl_step sample train concurrency toggle long measures http_step load async_rl; do $(BIN)/python benchmarks/$$name.py --write || exit 1; done

seeds: install
	$(BIN)/python recipes/quickstart_seeds.py

interference: install
	$(BIN)/python recipes/interference.py

narrow: install
	$(BIN)/python recipes/pretrain_nano.py --out build/narrow --width 64 --steps 6000 --threads 1

rates: install
	$(BIN)/python recipes/planned_rates.py --base nano --base build/narrow

nano: install
	$(BIN)/python recipes/pretrain_nano.py --out build/nano
	$(BIN)/python recipes/teach_nano.py --start build/nano --out src/veneer/assets/nano
	$(BIN)/python recipes/nano_card.py

clean:
	rm -rf $(VENV) .bench build dist src/*.egg-info
