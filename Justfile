# What developers and users run. `just` lists it.
python := ".venv/bin/python"

# The tests start many processes: modules are compiled once, also where this variable says otherwise
export PYTHONDONTWRITEBYTECODE := ""

_list:
    @just --list --unsorted

# Make .venv and install the server into it
[private]
venv:
    @test -x {{python}} || python3 -m venv .venv
    @{{python}} -c "import importlib.metadata as m; m.version('descant'); import torch, uvicorn" 2>/dev/null \
        || {{python}} -m pip install --quiet --editable '.[server]'

# Install everything the tests need as well
setup: venv
    @{{python}} -c "import importlib.metadata as m; [m.version(p) for p in ('peft', 'pykka', 'pytest-xdist', 'ruff', 'pyright')]" 2>/dev/null \
        || {{python}} -m pip install --quiet --editable '.[server,test]'

# Every demo voice at once, the executor killed in the middle, then a chat
demo: venv
    @.venv/bin/descant demo

# Serve: `just serve` the demo model, `just serve PATH --adapter NAME=PATH …` your own
serve *ARGS: venv
    .venv/bin/descant serve {{ARGS}}

# The tests, without the slow ones
test *ARGS: setup
    {{python}} -m pytest -n 2 --hypothesis-profile quick -m "not slow and not gpu" {{ARGS}}

# All tests a machine without a GPU can run
test-all *ARGS: setup
    {{python}} -m pytest -n 2 -m "not gpu" {{ARGS}}
    @echo "not run here: tests marked gpu (just test-gpu)"

# The tests that need a CUDA device
test-gpu *ARGS: setup
    {{python}} -m pytest -m gpu {{ARGS}}

lint: setup
    .venv/bin/ruff format --check .
    .venv/bin/ruff check .

# Print the folders, low to high, with what each imports; fail if an import goes up
layers:
    @python3 tests/layers.py

types: setup
    .venv/bin/pyright

# Measure, print tables, assert nothing
bench: setup
    {{python}} benchmarks/actors.py
    {{python}} benchmarks/scheduler.py
    {{python}} benchmarks/invariance.py
    {{python}} benchmarks/kernels.py
    {{python}} benchmarks/throughput.py
    {{python}} benchmarks/streaming.py
    {{python}} benchmarks/lora_tax.py
    {{python}} benchmarks/adapters.py
    {{python}} benchmarks/speculation.py --shape demo

# Descant against Transformers and PEFT (writes some 2 GB into the user's cache)
bench-peft *ARGS: setup
    {{python}} benchmarks/vs_peft.py {{ARGS}}

# What adapters cost: `just bench-lora --shape qwen` for the 0.5B shape
bench-lora *ARGS: setup
    {{python}} benchmarks/lora_tax.py {{ARGS}}

# Measure kernels and steps on a CUDA device; results go to benchmarks/results/
bench-gpu: setup
    {{python}} benchmarks/gpu.py

# What continuous integration runs
check: lint types test-all
