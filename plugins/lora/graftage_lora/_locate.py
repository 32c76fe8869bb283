"""Which files make up an adapter, in the layouts that trainers write."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Final

from graftage_lora import _gguf
from graftage_lora._files import Files, Opened, Refused

__all__ = ["CONFIG", "WEIGHTS", "entries", "is_adapter", "locate", "outside"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapters.npz", "pytorch_model.bin")
MAX_FOLDER: Final = 10_000
"""Entries of a folder that are looked at."""


def outside(path: Path, folder: Path) -> bool:
    """Whether a path, all links followed, leads out of a folder; a link that goes round leads nowhere in it."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # Python up to 3.12
        return True


def entries(folder: Path) -> list[str]:
    """The names in a folder, sorted; of a very large one, some of them."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in itertools.islice(found, MAX_FOLDER))


def locate(path: Path, within: Path | None = None) -> Files:
    """The files of the adapter at a path: a folder, its weights, or a GGUF file.

    Raises:
        Refused: there is nothing usable there.
    """
    if path.is_dir():
        return _in_folder(path, within)
    if not path.exists():
        raise Refused("there is no such file")
    config = path.with_name(CONFIG) if path.suffix == ".safetensors" else None
    return Files(weights=path, config=config, within=within)


def _in_folder(folder: Path, within: Path | None) -> Files:
    names = entries(folder)
    if CONFIG in names:
        for name in WEIGHTS.values():
            if name in names:
                return Files(weights=folder / name, config=folder / CONFIG, within=within)
    adapters = [name for name in names if name.endswith(".gguf") and is_adapter(folder / name, within)]
    if len(adapters) == 1:
        return Files(weights=folder / adapters[0], within=within)
    if adapters:
        raise Refused(f"the folder holds several adapters: {', '.join(adapters)}", "Name the file you mean.")
    if pickles := [name for name in PICKLES if name in names]:
        raise Refused(*_pickle(pickles[0]))
    raise Refused(
        "the folder holds no adapter",
        f"Expected are {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )


def is_adapter(path: Path, within: Path | None) -> bool:
    """Whether a GGUF file is an adapter and not a model, which some trainers put beside it."""
    try:
        with Opened(path, within=within) as file:
            return _gguf.read(file, _gguf.ADAPTER).is_adapter
    except Refused:
        return False


def _pickle(name: str) -> tuple[str, str]:
    return (
        f"`{name}` is a pickle, which can run any program when it is read",
        "Save the adapter as safetensors, the default of every current trainer.",
    )
