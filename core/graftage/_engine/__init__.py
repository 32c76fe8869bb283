"""The engine: what stands behind the clients. Its imports run one way."""
