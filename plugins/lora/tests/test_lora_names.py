"""Names of models: which of two surely differ."""

from __future__ import annotations

import pytest
from gguf.metadata import Metadata
from hypothesis import given
from hypothesis import strategies as st

from graftage.types import ModelInfo
from graftage_lora._names import name_warnings

CACHE = "/data/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/d149729398750b98c0af14eb82c78cfe92750796"

DIFFERENT = """
    HuggingFaceTB/SmolLM-135M | smollm2:135m
    HuggingFaceTB/SmolLM2-135M-Instruct | smollm:135m
    HuggingFaceTB/SmolLM-1.7B | HuggingFaceTB/SmolLM2-1.7B-Instruct
    HuggingFaceTB/SmolLM2-1.7B | smollm2:135m
    meta-llama/Meta-Llama-3-8B-Instruct | llama3.1:8b
    meta-llama/Llama-3.1-8B | llama3:8b
    unsloth/Meta-Llama-3.1-8B-bnb-4bit | llama3:8b-instruct-q4_K_M
    meta-llama/Llama-3.1-70B-Instruct | llama3.3:70b
    meta-llama/Llama-3.2-3B | llama3.2:1b
    meta-llama/Llama-2-7b-chat-hf | huggyllama/llama-7b
    Qwen/Qwen2-7B-Instruct | qwen2.5:7b
    Qwen/Qwen2.5-7B-Instruct | qwen2:7b
    Qwen/Qwen2.5-Coder-7B | qwen2.5:7b
    Qwen/Qwen2.5-7B | qwen2.5-coder:7b
    Qwen/Qwen2.5-Math-7B | qwen2.5:7b
    Qwen/Qwen2.5-Math-1.5B | qwen2.5-coder:1.5b
    Qwen/Qwen2.5-VL-7B-Instruct | qwen2.5:7b
    Qwen/Qwen3-0.6B | qwen2.5:0.5b
    Qwen/Qwen3-4B-Instruct-2507 | Qwen/Qwen3-4B-Instruct-2512
    deepseek-ai/DeepSeek-R1-Distill-Qwen-7B | qwen2.5:7b
    Qwen/Qwen2.5-Math-7B | deepseek-r1:7b
    deepseek-ai/DeepSeek-R1-Distill-Qwen-7B | deepseek-r1:8b-llama-distill-q4_K_M
    deepseek-ai/DeepSeek-R1-Distill-Llama-8B | llama3.1:8b
    deepseek-ai/deepseek-coder-6.7b-base | deepseek-ai/deepseek-llm-6.7b
    NousResearch/Hermes-3-Llama-3.1-8B | llama3.1:8b
    nvidia/Llama-3.1-Nemotron-Nano-8B-v1 | llama3.1:8b
    mistralai/Mistral-7B-v0.1 | mistral:7b-instruct-v0.3-q4_K_M
    mistralai/Mistral-7B-Instruct-v0.3 | mistralai/Mistral-7B-Instruct-v0.2
    mistralai/Mistral-7B-v0.3 | llama2:7b
    HuggingFaceH4/zephyr-7b-beta | mistral:7b
    google/gemma-2-9b-it | gemma3:12b
    google/gemma-2b-it | gemma2:2b
    google/gemma-3-4b-it | hf.co/unsloth/gemma-3n-E4B-it-GGUF:Q4_K_M
    google/codegemma-7b | gemma:7b
    codellama/CodeLlama-7b-hf | llama2:7b
    TinyLlama/TinyLlama-1.1B-Chat-v1.0 | llama3.2:1b
    microsoft/Phi-3-mini-4k-instruct | phi3.5:3.8b
    microsoft/Phi-3-mini-4k-instruct | phi3:medium
    ibm-granite/granite-3.1-2b-instruct | granite3.3:2b
    tiiuae/falcon-7b | falcon3:7b
    /data/huggingface/hub/models--Qwen--Qwen2-7B/snapshots/0123456789abcdef | qwen2.5:7b
    C:\\Users\\me\\models--Qwen--Qwen2.5-Coder-7B\\snapshots\\0123456789abcdef | qwen2.5:7b
    /home/me/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct | qwen2:7b
    someone/other-7b | small:1m
    meta-llama/Llama-Guard-3-1B | llama3.2:1b
    Qwen/Qwen2.5-7B | qwen3:8b
    Qwen/Qwen3-4B | qwen3-vl:4b
    Qwen/Qwen3-Embedding-0.6B | qwen3:0.6b
    mistralai/Mistral-7B-v0.1 | mathstral:7b
    Qwen/CodeQwen1.5-7B | qwen:7b
    01-ai/Yi-1.5-6B | llama2:7b
    meta-llama/Llama-3.2-1B | HuggingFaceTB/SmolLM2-1.7B
"""
SAME = """
    someone/small-1m | small:1m
    HuggingFaceTB/SmolLM2-135M-Instruct | smollm2:135m
    unsloth/SmolLM2-135M-Instruct-bnb-4bit | smollm2:135m-instruct-q4_K_M
    mlx-community/SmolLM2-135M-Instruct-4bit | smollm2:135m
    meta-llama/Llama-3.2-1B-Instruct | llama3.2:1b
    meta-llama/Llama-3.2-1B | llama3.2
    meta-llama/Meta-Llama-3.1-8B-Instruct | llama3.1:8b-instruct-fp16
    meta-llama/Meta-Llama-3-8B | llama3:latest
    meta-llama/Llama-2-7b-chat-hf | llama2:7b
    unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit | hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M
    unsloth/llama-3-8b-bnb-4bit | llama3:8b
    /data/llama-3_2-1b | llama3.2:1b
    /data/llama-3-2-1b-instruct | llama3.2:1b
    Qwen/Qwen2.5-7B | qwen2.5:7b-instruct-q4_K_M
    Qwen/Qwen2.5-7B-Instruct-AWQ | registry.ollama.ai/library/qwen2.5:7b
    Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 | qwen2.5:7b
    Qwen/Qwen2.5-Coder-7B-Instruct | qwen2.5-coder:7b
    Qwen/Qwen2.5-VL-7B-Instruct | qwen2.5vl:7b
    Qwen/Qwen2.5-0.5B | /srv/models/qwen2.5-0.5b-instruct-q8_0.gguf
    Qwen/Qwen1.5-7B-Chat | qwen:7b
    Qwen/Qwen3-4B-Instruct-2507 | qwen3:4b
    Qwen/Qwen3-4B-Instruct-2507 | qwen3:4b-instruct-2507-q4_K_M
    Qwen/Qwen3-30B-A3B | qwen3:30b-a3b
    deepseek-ai/DeepSeek-R1-Distill-Qwen-7B | deepseek-r1:7b
    deepseek-ai/DeepSeek-R1-0528-Qwen3-8B | deepseek-r1:8b
    unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit | deepseek-r1:8b-llama-distill-q4_K_M
    NousResearch/Hermes-3-Llama-3.1-8B | hermes3:8b
    mistralai/Mistral-7B-v0.3 | mistral:7b
    mistralai/Mistral-7B-Instruct-v0.3 | mistral:7b-instruct-v0.3-q4_K_M
    mistralai/Mistral-Small-3.1-24B-Instruct-2503 | mistral-small3.1:24b
    mistralai/Mistral-Nemo-Instruct-2407 | mistral-nemo:12b
    google/gemma-2-9b-it | gemma2:9b
    google/gemma-2b | gemma:2b
    google/gemma-1.1-2b-it | gemma:2b
    google/gemma-3-4b-it | gemma3:4b-it-qat
    google/gemma-3n-E2B-it | gemma3n:e2b
    microsoft/Phi-3-mini-4k-instruct | phi3:3.8b
    microsoft/phi-2 | phi:2.7b
    TinyLlama/TinyLlama-1.1B-Chat-v1.0 | tinyllama:1.1b
    stabilityai/stablelm-2-1_6b | stablelm2:1.6b
    allenai/OLMo-2-1124-7B | olmo2:7b
    ibm-granite/granite-3.1-2b-instruct | granite3.1-dense:2b
    HuggingFaceH4/zephyr-7b-beta | zephyr:7b
    mistralai/Mixtral-8x7B-v0.1 | mixtral:8x7b
    google/gemma-3-270m-it | gemma3:270m
    microsoft/Phi-4-mini-instruct | phi4-mini:3.8b
    mlx-community/Meta-Llama-3.1-8B-Instruct-bf16 | llama3.1
    Qwen/Qwen2.5-7B-Instruct | /m/Qwen_Qwen2.5-7B-Instruct-Q4_K_M-00001-of-00002.gguf
    Qwen/Qwen2.5-Coder-7B | Qwen2.5-Coder-7B.Q4_K_M.gguf
    LiquidAI/LFM2-1.2B | lfm2:1.2b
    openai/gpt-oss-20b | mlx-community/gpt-oss-20b-MXFP4-Q8
    tiiuae/Falcon3-7B-Instruct | falcon3:7b
    google/gemma-3-12b-it-qat-q4_0-unquantized | gemma3:12b
    TheBloke/Llama-2-7B-Chat-GPTQ | llama2:7b-chat
    /home/me/out/llama-20240612 | llama3.1:8b
    ./output/gemma-2024-06-01 | gemma2:9b
    llama_16bit | llama3.2:1b
    qwen-16bit-merged | qwen2.5:7b
    ./smollm2-135m-finetuned | smollm2:135m
    ./output/merged | qwen2.5:7b
    ./output/checkpoint-500 | llama3.1:8b
    checkpoint-500/ | smollm2:135m
    /tmp/tmpa7b | llama3.1:8b
    /workspace/base | gemma2:2b
    Qwen/Qwen2.5-7B | assistant:latest
    Qwen/Qwen2.5-7B | my-qwen
    0123456789abcdef0123456789abcdef01234567b | llama3.1:8b
    /home/me/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct | qwen2.5:7b
"""


def table(text: str) -> list[tuple[str, str]]:
    return [
        (stated.strip(), base.strip()) for stated, _, base in (line.partition("|") for line in text.split("\n")) if base
    ]


def warned(stated: str, base: str, **facts: object) -> bool:
    return bool(name_warnings([stated], ModelInfo(name=base, metadata=facts)))


def converted(text: str) -> list[tuple[str, dict[str, str]]]:
    """Each name of a table with the keys that llama.cpp's converter writes for the repository beside it."""
    found = []
    for pair in table(text):
        for stated, base in (pair, pair[::-1]):
            if base.count("/") == 1 and ":" not in base and not base.startswith((".", "/")):
                title, _, basename, finetune, version, size = Metadata.get_model_id_components(base)
                facts = {"name": title and title.replace("-", " "), "basename": basename, "finetune": finetune}
                facts |= {"version": version, "size_label": size}
                found.append((stated, {f"general.{key}": value for key, value in facts.items() if value}))
    return found


class TestNames:
    def test_different_models_warn(self) -> None:
        missed = [each for each in table(DIFFERENT) if not (warned(*each) and warned(*reversed(each)))]
        assert missed == []

    def test_equal_or_unclear_names_are_silent(self) -> None:
        found = [each for each in [*table(SAME), (CACHE, "qwen2.5:7b")] if warned(*each) or warned(*reversed(each))]
        assert found == []

    def test_converted_models_are_compared_alike(self) -> None:
        missed = [(stated, facts) for stated, facts in converted(DIFFERENT) if not warned(stated, "mine", **facts)]
        found = [(stated, facts) for stated, facts in converted(SAME) if warned(stated, "mine", **facts)]
        assert (missed, found) == ([], [])
        counted = {"general.basename": "merged", "general.name": "Merged", "general.size_label": "494M"}
        assert not warned("Qwen/Qwen2.5-0.5B", "mine", **counted)

    def test_metadata_speaks_for_unclear_name(self) -> None:
        facts = {"general.basename": "Qwen2.5", "general.name": "Qwen2.5 7B Instruct"}
        base = ModelInfo(name="assistant:latest", metadata=facts, parent="/models/blobs/sha256-0123")
        assert name_warnings(["meta-llama/Llama-3.1-8B"], base)
        assert name_warnings(["Qwen/Qwen2.5-Coder-7B"], base)
        assert not name_warnings(["Qwen/Qwen2.5-7B", None, ""], base)

    def test_one_fitting_name_is_enough(self) -> None:
        base = ModelInfo(name="llama-like:7b", metadata={}, parent="mistral:7b")
        assert not name_warnings(["mistralai/Mistral-7B-v0.3"], base)

    @pytest.mark.parametrize("text", ["", "/", "\\", "models----", ":", "7b", "v", "9" * 400 + "b", "é" * 500])
    def test_odd_text_is_silent(self, text: str) -> None:
        assert not warned(text, text)

    @given(st.text(), st.text())
    def test_any_text_is_compared(self, stated: str, base: str) -> None:
        assert warned(stated, base) == warned(base, stated) or not (stated and base)
        assert not warned(stated, stated)
