"""An environment's module by its id, and its problems in two splits."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any


class Refused(Exception):
    """The settings, or what is installed, are not what is needed; in one line."""


def module_of(identity: str, folder: str | None) -> ModuleType:
    """As verifiers finds it: ``owner/some-name@version`` is the module some_name, or one of the tasksets that ship with v1.

    Raises:
        Refused: verifiers is not installed, or there is no such module.
    """
    if importlib.util.find_spec("verifiers") is None:
        raise Refused(f"{sys.executable} has no package verifiers; run: {sys.executable} -m pip install verifiers, or set env.args.python")
    name = identity.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_")
    for candidate in (f"verifiers.v1.tasksets.{name.lower()}", name):
        try:
            found = importlib.util.find_spec(candidate) is not None
        except (ImportError, ValueError):
            found = False
        if found:
            return importlib.import_module(candidate)
    near = difflib.get_close_matches(identity, known(folder), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "install its package there, or name its folder in env.args.folder"
    raise Refused(f"{sys.executable} has no verifiers environment {identity!r}; {hint}")


def known(folder: str | None) -> list[str]:
    """Names that may be meant: packages that need verifiers, modules of the folder, tasksets that ship with v1."""
    names = {
        str(d.metadata["Name"])
        for d in metadata.distributions()
        if any(need.startswith("verifiers") for need in d.requires or ()) and d.metadata["Name"]
    }
    if folder:
        names |= {module.name.replace("_", "-") for module in pkgutil.iter_modules([folder])}
    shipped = importlib.util.find_spec("verifiers.v1.tasksets") if importlib.util.find_spec("verifiers.v1") else None
    names |= {module.name for module in pkgutil.iter_modules(shipped.submodule_search_locations if shipped else [])}
    return sorted(names)


def text_of(prompt: Any) -> str:
    """A prompt as one text, whether it was one or is a list of messages, of dicts or of objects."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def held_out(text: str) -> bool:
    """The rule of Veneer's own environments (envs/dataset.py): one problem in eight, by its text alone."""
    return _digest(text)[-1] % 8 == 0


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def split(train: Sequence[str], held: Sequence[str] | None) -> dict[str, list[tuple[bool, int]]]:
    """Places of problems by split, as (it is in the environment's own held-out data, its index there).

    ``train`` and ``held`` are the texts of the environment's two sets of problems. Without ``held`` one in eight of ``train`` is
    held out, and at least one. A problem of ``train`` that is in ``held`` too is left out of training.
    """
    if not held:
        out = {text for text in train if held_out(text)} or set(sorted(train, key=_digest)[:1])
        places = {kind: [(False, i) for i, text in enumerate(train) if (text in out) == (kind == "eval")] for kind in ("train", "eval")}
    else:
        seen = set(held)
        places = {
            "train": [(False, i) for i, text in enumerate(train) if text not in seen],
            "eval": [(True, i) for i in range(len(held))],
        }
    for kind, found in places.items():
        if not found:
            raise Refused(f"the environment has no problem for {kind}: {len(train)} to train on, {len(held or ())} held out")
    return places
