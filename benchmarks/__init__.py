"""What Graftage costs compared with other clients, and how that grows: `python -m benchmarks --help`."""
