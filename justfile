# The commands of this project. They run what `.venv` has, or what is installed if there is no `.venv`.
scripts := if os_family() == "windows" { "Scripts" } else { "bin" }
export PATH := justfile_directory() / ".venv" / scripts + PATH_VAR_SEP + env("PATH")
export PYTHONDONTWRITEBYTECODE := "" # with byte code, tests and the programs they start begin much sooner

# Run all tests on all cores: the command of the README.
test *arguments:
    python -m pytest -n auto --dist worksteal {{arguments}}

# Run one case of each test, in less than a minute on two cores; `tests/fast.py` has the rule.
test-fast *arguments:
    python -m pytest -n auto --dist worksteal -p fast {{arguments}}

# Check the style.
lint:
    ruff check .
    ruff format --check .

# Check the types of everything, strictly.
types:
    mypy

# Record cassettes again, from the server that GRAFTAGE_LIVE_OLLAMA names: all, or for example `-k capital`.
record *arguments:
    python -m pytest providers/ollama/tests/test_ollama.py --record-mode=rewrite {{arguments}}

# Measure Graftage and Ollama's own client, and how the cost grows; `--peers` measures other frameworks, too.
bench *arguments:
    python -m benchmarks --out build/benchmark --pictures docs {{arguments}}

# Run what takes longer than tests may: before a release, too.
nightly:
    python -m pytest -n auto --dist worksteal --hypothesis-profile=search tests/test_fuzz.py core providers/ollama plugins
    python scripts/mutants.py -j 2
    python scripts/soak.py --minutes 60
    python -m benchmarks --overshoot

# Look for bytes that break a reader, until some are found: `just fuzz errors -max_total_time=600`.
fuzz *arguments:
    python scripts/fuzz.py {{arguments}}
