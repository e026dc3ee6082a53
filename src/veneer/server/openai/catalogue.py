"""Names: which models there are for a caller, and what a name means now."""

from __future__ import annotations

import asyncio
import difflib
from functools import lru_cache
from pathlib import Path

from veneer.server.access import Caller
from veneer.server.bases import Bases, Served
from veneer.server.errors import NotFound
from veneer.server.openai.errors import FieldError, UnknownModel
from veneer.store.adapters import ALORA, read_manifest
from veneer.store.entry import Entry, check_compatible
from veneer.store.registry import LIVE, Registry
from veneer.types import AdapterError

MOST_KNOWN = 4096
"""References that are remembered."""


class Catalogue:
    """The bases in memory and the adapters of the registry. Every question asks the registry, as other processes change it too."""

    def __init__(self, bases: Bases, registry: Registry) -> None:
        self.bases, self.registry = bases, registry
        self.unloaded: set[str] = set()
        """Names that are not served until they are loaded again."""
        self._known: dict[str, tuple[int | None, Entry]] = {}
        """What references meant, after how many changes of their name."""

    def base(self, name: str) -> Served | None:
        try:
            return self.bases.find(name)
        except NotFound:
            return None

    def base_of(self, entry: Entry) -> Served | None:
        """None: the server does not hold it."""
        return next((base for base in self.bases.served if base.engine.base_digest == entry.base_digest), None)

    def is_there(self, caller: Caller, name: str) -> bool:
        return name not in self.unloaded and caller.sees(name)

    async def find(self, caller: Caller, reference: str, param: str = "model") -> Entry:
        """The version that NAME, NAME@VERSION or NAME@LABEL means at this moment.

        Raises:
            UnknownModel: there is none for this caller.
        """
        name = reference.partition("@")[0]
        if not self.is_there(caller, name) or "/" in reference or ":" in reference or reference.startswith("."):
            raise await self._unknown(caller, reference, param)
        try:
            return await asyncio.to_thread(self._resolve, reference, name)
        except AdapterError as error:
            raise await self._unknown(caller, reference, param, error) from error

    def _resolve(self, reference: str, name: str) -> Entry:
        """Read again only what was changed: asking for changes is one small query."""
        changes = self.registry.changes(name)
        known = self._known.get(reference)
        if known is not None and known[0] == changes:
            return known[1]
        entry = self.registry.resolve(reference)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[reference] = (changes, entry)
        return entry

    async def _unknown(self, caller: Caller, reference: str, param: str, error: AdapterError | None = None) -> UnknownModel:
        """With what comes nearest, of what the caller may see."""
        name = reference.partition("@")[0]
        names = [entry.name for entry in await self.live(caller)]
        if error is not None and name in names:
            return UnknownModel(str(error), param)
        known = [*self.bases.names(), *names] if param == "model" else names
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known[:12])}" if known else "; there are none"
        what = "model" if param == "model" else "adapter"
        return UnknownModel(f"there is no {what} {reference[:100]!r}{hint}", param)

    async def entries(self, caller: Caller, name: str | None = None) -> list[Entry]:
        """All versions that the caller may see, by name and version."""
        found = await asyncio.to_thread(self.registry.entries, name)
        return [entry for entry in found if self.is_there(caller, entry.name)]

    async def live(self, caller: Caller) -> list[Entry]:
        """What each bare name means."""
        versions: dict[str, Entry] = {}
        for entry in await self.entries(caller):
            held = versions.get(entry.name)
            if held is None or LIVE not in held.labels:  # ascending: the label's version, else the newest
                versions[entry.name] = entry
        return list(versions.values())

    def check(self, entry: Entry, served: Served, param: str) -> None:
        """
        Raises:
            FieldError: the adapter was made on another base, tokenizer or template, or is no low-rank update.
        """
        renderer = served.renderer
        try:
            check_compatible(entry, served.engine.base_digest, renderer.tokenizer_digest, renderer.template_digest)
        except AdapterError as error:
            raise FieldError(str(error), param) from error
        if entry.rank is None:
            raise FieldError(f"{entry.reference} is a fully fine-tuned copy of its base; this server adds adapters to a base", param)


@lru_cache(4096)
def invocation_tokens(folder: Path) -> tuple[int, ...]:
    """Those from which on an activated adapter acts; none for one that acts everywhere. Folders of the registry never change."""
    tokens = read_manifest(folder).get(ALORA) or ()
    return tuple(int(token) for token in tokens)
