# Measure Graftage against Ollama's own client, and how its cost grows; with `--peers` against other frameworks, too.
bench *arguments:
    python -m benchmarks --out build/benchmark --pictures docs {{arguments}}

# What takes longer than the tests may; before a release, too.
nightly:
    python -m pytest -n auto --dist worksteal --hypothesis-profile=search tests/test_fuzz.py core providers/ollama plugins
    python scripts/mutants.py -j 2
    python scripts/soak.py --minutes 60
    python -m benchmarks --overshoot

# Look for bytes that break a reader, until some are found: `just fuzz errors -max_total_time=600`.
fuzz *arguments:
    python scripts/fuzz.py {{arguments}}
