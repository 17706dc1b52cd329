# Everything on a CPU machine. `make demo` and `make test` install into .venv first, once.
VENV   ?= .venv
PYTHON ?= python3
# One thread a process: two ranks with a thread pool each fight over the cores.
export OMP_NUM_THREADS = 1

.PHONY: demo test test-fast env clean

# torch's own errors only: on a CPU, vLLM warns through it of how it places memory.
demo: env                          ## train the tiny model with SRFT in two processes and draw out/tiny/curves.png
	rm -rf out/tiny
	TORCH_CPP_LOG_LEVEL=ERROR $(VENV)/bin/torchrun --standalone --nproc_per_node=2 srft.py --preset tiny

test: $(VENV)/.tests-installed     ## all tests
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not clock" --durations=25 tests
	$(VENV)/bin/python -m pytest -q -m clock tests

test-fast: $(VENV)/.tests-installed ## the core, under two minutes
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not clock" tests

env: $(VENV)/.installed            ## the virtual environment

# torchvision and its kin come as dependencies, are not used, and break transformers where their build is not torch's.
$(VENV)/.installed: requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-cpu.txt
	$(VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed requirements-dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c requirements-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache
