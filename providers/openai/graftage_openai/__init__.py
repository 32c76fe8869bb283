"""The provider for servers that speak OpenAI's chat API: OpenAI, MLX, llama-server, LM Studio, vLLM and others."""

from __future__ import annotations

__all__: list[str] = []
