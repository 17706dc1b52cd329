# Everything on a CPU machine. What needs an environment installs it into .venv first, once.
VENV   ?= .venv
PYTHON ?= python3
# What installs: pip, or PIP="uv pip", which with UV_TORCH_BACKEND=cpu finds torch's builds for CPU by itself
# where the package index does not offer them.
PIP    ?= $(VENV)/bin/pip --disable-pip-version-check
# One thread a process: two ranks with a thread pool each fight over the cores.
export OMP_NUM_THREADS = 1

.PHONY: demo test test-fast test-older lint env env-older clean

demo: env                          ## train the tiny model with SRFT in two processes, draw out/tiny/curves.png
	rm -rf out/tiny
	TORCHRUN=$(VENV)/bin/torchrun runs/tiny.sh

test: $(VENV)/.tests-installed     ## all tests
	$(VENV)/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not clock" --durations=40 tests
	$(VENV)/bin/python -m pytest -q -m clock tests

test-fast: $(VENV)/.tests-installed ## the core, 2 minutes
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not clock" tests

lint: $(VENV)/.tests-installed     ## ruff, as pyproject.toml says
	$(VENV)/bin/ruff check .

env: $(VENV)/.installed            ## the virtual environment

# torchvision and its kin come as dependencies, are not used, and break transformers where their build is not
# torch's.
$(VENV)/.installed: requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	VIRTUAL_ENV=$(VENV) $(PIP) install --quiet -r requirements-cpu.txt
	VIRTUAL_ENV=$(VENV) $(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed requirements-dev.txt
	VIRTUAL_ENV=$(VENV) $(PIP) install --quiet -r requirements-dev.txt -c requirements-cpu.txt
	touch $@

# Its torch may be a wheel for CUDA: the tests pass --device cpu.
test-older: env-older              ## on the oldest supported versions: the core, and whole runs of srft, grpo and eval.py
	.venv-older/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not clock" tests
	.venv-older/bin/python -m pytest -q tests/test_run.py tests/test_eval.py \
	    -k "leaves_the_folder_that_the_readme_promises or (every_method_trains and grpo) or the_command_of_table_a1"

env-older:                         ## the virtual environment with them, .venv-older
	$(PYTHON) -m venv .venv-older
	.venv-older/bin/pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=.venv-older .venv-older/bin/uv pip install --quiet -r requirements-cpu.txt -r requirements-dev.txt \
	    --override requirements-older.txt
	VIRTUAL_ENV=.venv-older .venv-older/bin/uv pip uninstall --quiet torchvision torchaudio torchcodec

clean:
	rm -rf $(VENV) .venv-older out .pytest_cache .ruff_cache
