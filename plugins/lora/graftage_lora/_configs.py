"""Reads the configurations of PEFT and mlx-lm: the scale of each module, and what the adapter should contain.

What would change the numbers in a way that no server applies is refused by kind: also a field that is not known here,
if its name says that it configures a variant.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from graftage_lora._files import CONFIG, WEIGHTS, CheckedFile, Files, Refused
from graftage_lora._lora import Targets
from graftage_lora._patterns import Patterns

__all__ = [
    "MAX_RANK",
    "MERGE",
    "Config",
    "Scales",
    "invocation_tokens",
    "is_finite",
    "parse_json",
    "read_config",
]

MAX_CONFIG: Final = 1 << 20
MAX_RANK: Final = 1024
MAX_TOKEN: Final = 1 << 31
MERGE: Final = "Merge it in its trainer (`merge_and_unload`), and use the result as the model."
Scales: TypeAlias = Callable[[str, int], float]
"""Returns the scale of a module by name and rank; refuses another rank than the configuration states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a configuration says."""

    layout: Literal["peft", "mlx"]
    scale: Scales
    base_model: str | None
    invocation: tuple[int, ...] = ()
    targets: Targets | None = None


def read_config(files: Files) -> Config:
    """Read the configuration beside the weights; refuse it if it is missing, invalid, or of another kind."""
    found = _document(files)
    # Some converters write both vocabularies; each program reads its own, with the weights of its own name.
    mlx = "lora_parameters" in found or "fine_tune_type" in found
    if "peft_type" in found and not (mlx and files.weights.name == WEIGHTS["mlx"]):
        _check_peft(found)
        return Config(
            layout="peft",
            scale=_peft_scales(found),
            base_model=_base(found),
            invocation=_invocation(found),
            targets=_peft_targets(found),
        )
    if mlx:
        parameters = _mlx_parameters(found)
        return Config(
            layout="mlx",
            scale=_mlx_scales(found, parameters),
            base_model=_base(found),
            invocation=_invocation(found),
            targets=_mlx_targets(found, parameters),
        )
    raise Refused("its configuration is neither PEFT's (`peft_type`) nor mlx-lm's (`lora_parameters`)")


def _invocation(config: Mapping[str, object]) -> tuple[int, ...]:
    found = invocation_tokens(config.get("alora_invocation_tokens"))
    if config.get("invocation_string") and not found:
        reason = "`invocation_string` is set: it acts only after a text, whose tokens are missing"
        raise Refused(reason, "Convert it by llama.cpp's `convert_lora_to_gguf.py`, which adds the tokens.")
    return found


def _base(config: Mapping[str, object]) -> str | None:
    stated = (config.get(key) for key in ("base_model_name_or_path", "model"))
    return next((each for each in stated if isinstance(each, str) and each), None)


def _document(files: Files) -> dict[str, Any]:
    if files.config is None or not files.config.exists():
        raise Refused(f"`{CONFIG}` with the scale is missing", "Put it beside the weights.")
    with CheckedFile(files.config, within=files.within, limit=MAX_CONFIG) as file:
        return parse_json(bytes(file.rest()).removeprefix(codecs.BOM_UTF8), f"`{file.name}`")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse an object in strict JSON, or refuse it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise Refused(f"{what} cannot be read: it has a key twice")
        return table

    def no_constant(name: str) -> Any:
        raise Refused(f"{what} cannot be read: it contains {name}")

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise Refused(f"{what} cannot be read: it is not valid JSON") from None
    if not isinstance(found, dict):
        raise Refused(f"{what} is not a JSON object")
    return found


def _number(value: object, key: str) -> float:
    """Return a finite number other than 0: a scale of 0 would change nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value or not is_finite(value):
        raise Refused(f"`{key}` must be a finite number other than 0, not {str(value)[:40]}")
    return float(value)


def is_finite(value: float) -> bool:
    """Return whether a number is finite, as a float too."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _rank(value: object, key: str) -> int:
    if isinstance(value, float) and value.is_integer():  # Some tools write every number as a float.
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise Refused(f"`{key}` must be an integer from 1 to {MAX_RANK}, not {str(value)[:40]}")
    return value


def _names(value: object) -> tuple[str, ...]:
    """Return a list of names; `()` for anything else."""
    return tuple(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else ()


def invocation_tokens(value: object) -> tuple[int, ...]:
    """Return the tokens after which an activated LoRA acts; refuse what is not a list of token numbers."""
    if not value:
        return ()
    tokens = tuple(value) if isinstance(value, (list, tuple)) else (-1,)
    if len(tokens) > 4096 or not all(type(each) is int and 0 <= each < MAX_TOKEN for each in tokens):
        raise Refused("its invocation tokens are not a list of token numbers")
    return tokens


# --- PEFT ------------------------------------------------------------------------------------------------------------

REFUSED_FIELDS: Final[Mapping[str, str]] = {
    "lora_bias": "it trains separate biases",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it trains single tokens",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it targets bare parameters",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it also changes the base model",
    "monteclora_config": "it samples its weights",
    "velora_config": "it projects its inputs",
}
HARMLESS_FIELDS: Final = frozenset(
    {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "runtime_config", "use_rslora"}
)
"""Fields of an initialisation, which `init_lora_weights` names, and of how PEFT computes."""
HARMLESS_INITS: Final = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Initialisations that leave the base model as it is. Of others, the saved halves are not the whole change."""


def _check_peft(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Refused(f"`peft_type` must be LORA, not {str(kind)[:40]}")
    for key, value in config.items():
        variant = key.startswith("use_") or key.endswith("_config")
        if value and (key in REFUSED_FIELDS or (variant and key not in HARMLESS_FIELDS)):
            why = REFUSED_FIELDS.get(key, "it is a variant of LoRA")
            raise Refused(f"`{key[:40]}` is set: {why}, which no supported server can apply", MERGE)
    if config.get("bias", "none") not in ("none", None):
        raise Refused("`bias` is set: it trains the biases of the base model", MERGE)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in HARMLESS_INITS:
        raise Refused(
            f"it was initialised by `{start[:40]}`, which also changes the base model",
            "Save it with `path_initial_model_for_weight_conversion`.",
        )


def _peft_scales(config: Mapping[str, object]) -> Scales:
    """Return PEFT's scales: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns override single modules.

    Of `rank_pattern` only the ranks count: a module's own is that of its weights.
    """
    ranks = {_rank(config.get("r"), "r")}
    ranks.update(_rank(value, "rank_pattern") for value in _pattern(config, "rank_pattern").values())
    alpha = _number(config.get("lora_alpha"), "lora_alpha")
    pattern = _pattern(config, "alpha_pattern")
    alphas = Patterns({key: _number(each, "alpha_pattern") for key, each in pattern.items()})
    stabilised = bool(config.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        _require_rank(module, rank, ranks)
        return alphas.find(module, alpha) / (math.sqrt(rank) if stabilised else rank)

    return scale


def _require_rank(module: str, rank: int, ranks: Collection[int]) -> None:
    if rank not in ranks:
        stated = " or ".join(map(str, sorted(ranks)[:5]))
        raise Refused(f"`{module[:120]}` has the rank {rank}, but its configuration states {stated}")


def _pattern(config: Mapping[str, object], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise Refused(f"`{key}` is not a JSON object")
    return found


def _peft_targets(config: Mapping[str, object]) -> Targets | None:
    """Return what PEFT has trained, if that is a list of names and not an expression."""
    names, layers = _names(config.get("target_modules")), config.get("layers_to_transform")
    if not names or config.get("exclude_modules"):
        return None
    numbers = layers if isinstance(layers, list) else [layers]
    return Targets(names=names, layers=tuple(each for each in numbers if isinstance(each, int)) or None)


# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def _mlx_parameters(config: Mapping[str, object]) -> Mapping[str, Any]:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise Refused(f"`fine_tune_type` must be lora, not {str(kind)[:40]}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise Refused("`lora_parameters` with the scale are missing")
    return parameters


def _mlx_scales(config: Mapping[str, object], parameters: Mapping[str, Any]) -> Scales:
    """Return mlx-lm's scales: `scale` as stated, which every release requires.

    Releases of 2024 that wrote `lora_layers` multiplied it by `alpha` / `rank`. Those that write `num_layers` copy an
    `alpha` from old instructions, and ignore it.
    """
    rank = _rank(parameters["rank"], "rank") if "rank" in parameters else None
    scale = _number(parameters.get("scale"), "scale")
    if "num_layers" not in config and parameters.get("alpha", rank) != rank:
        raise Refused(
            "`lora_parameters` have an `alpha`, whose meaning depends on the release of mlx-lm",
            "Remove it, and multiply `scale` by alpha / rank if the adapter was trained before October 2024.",
        )

    def find(module: str, own: int) -> float:
        _require_rank(module, own, {rank or own})
        return scale

    return find


def _mlx_targets(config: Mapping[str, object], parameters: Mapping[str, Any]) -> Targets | None:
    """Return what mlx-lm has trained: some modules of the last layers; of all layers if the number is not positive."""
    last = config.get("num_layers", config.get("lora_layers"))
    if type(last) is not int:
        return None
    return Targets(names=_names(parameters.get("keys")), layers=range(-last, 0) if last > 0 else None)
