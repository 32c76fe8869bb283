# Measure Graftage against Ollama's own client, and how its cost grows; with `--peers` against other frameworks, too.
bench *arguments:
    python -m benchmarks --out build/benchmark --pictures docs {{arguments}}
