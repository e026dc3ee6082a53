"""Adapters while the server runs: in from a folder as vLLM has it, labels moved and moved back, versions forgotten."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from veneer.server.access import Caller
from veneer.server.bases import Served
from veneer.server.errors import Forbidden, NotFound
from veneer.server.openai.answers import AdapterCard, AdapterList, AdapterVersion, ForgetReceipt, Model, ModelDigests, ModelList
from veneer.server.openai.catalogue import Catalogue
from veneer.server.openai.errors import FieldError, UnknownModel
from veneer.server.openai.loading import Loading
from veneer.server.openai.requests import LoadRequest, Promotion, Rollback, UnloadRequest
from veneer.store.adapters import CONFIG, MANIFEST, facts_of, read_adapter, recorded_base
from veneer.store.entry import Entry, Parent
from veneer.store.foreign import read_peft
from veneer.store.registry import LIVE, Registry, check_name, is_path
from veneer.types import AdapterError, Checkpoint

T = TypeVar("T")
LOG = logging.getLogger("veneer.server")
LOOK_EVERY = 2.0
"""Seconds within which memory follows what another process forgets."""


class Management:
    def __init__(self, catalogue: Catalogue, loading: Loading, registry: Registry, folder: Path | None) -> None:
        """``folder``: adapters may be loaded from inside of it; None: from nowhere."""
        self.catalogue, self.loading, self.registry = catalogue, loading, registry
        self.folder = None if folder is None else folder.resolve()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._forgotten: deque[str] = deque()
        """Digests that are to leave memory."""
        registry.on_forget(lambda stone: self._forgotten.append(stone.digest))

    # ------------------------------------------------ what there is

    async def models(self, caller: Caller) -> ModelList:
        """Bases by all their names, and adapters whose base is here."""
        bases = [self._base(served, name) for served in self.catalogue.bases.served for name in served.names]
        adapters = [self._adapter(entry, entry.name) for entry in await self.catalogue.live(caller)]
        return ModelList(object="list", data=bases + [model for model in adapters if model is not None])

    async def model(self, caller: Caller, name: str) -> Model:
        """
        Raises:
            UnknownModel: the server does not hold it.
        """
        served = self.catalogue.base(name)
        if served is not None:
            return self._base(served, name)
        found = self._adapter(await self.catalogue.find(caller, name), name)
        if found is None:
            raise UnknownModel(f"the base of adapter {name!r} is not on this server")
        return found

    def _base(self, served: Served, name: str) -> Model:
        digests = ModelDigests(base_digest=served.engine.base_digest)
        return _model(name, served.name, None, served, digests)

    def _adapter(self, entry: Entry, name: str) -> Model | None:
        served = self.catalogue.base_of(entry)
        if served is None:
            return None
        digests = ModelDigests(base_digest=entry.base_digest, version=entry.version, digest=entry.digest)
        return _model(name, entry.reference, served.name, served, digests, entry.created)

    async def adapters(self, caller: Caller) -> AdapterList:
        """All versions with labels, lineage and scores."""
        names: dict[str, list[Entry]] = {}
        for entry in await self.catalogue.entries(caller):
            names.setdefault(entry.name, []).append(entry)
        return AdapterList(object="list", data=[self._card(caller, entries) for entries in names.values()])

    async def adapter(self, caller: Caller, name: str) -> AdapterCard:
        return self._card(caller, await self._versions(caller, name))

    async def _versions(self, caller: Caller, name: str) -> list[Entry]:
        entries = await self.catalogue.entries(caller, name) if self.catalogue.is_there(caller, name) else []
        if not entries:
            await self.catalogue.find(caller, name, "name")  # says what there is
        return entries

    def _card(self, caller: Caller, entries: list[Entry]) -> AdapterCard:
        newest = entries[-1]
        served = self.catalogue.base_of(newest)
        versions = [
            AdapterVersion(
                version=entry.version,
                digest=entry.digest,
                stage=entry.stage,
                created=entry.created,
                rank=entry.rank,
                parents=[_parent(caller, parent) for parent in entry.parents],
                scores=[vars(score) for score in entry.scores],
                labels=list(entry.labels),
                loaded=any(entry.digest in base.shelf for base in self.catalogue.bases.served),
            )
            for entry in entries
        ]
        labels = {label: entry.version for entry in entries for label in entry.labels}
        base = None if served is None else served.name
        return AdapterCard(name=newest.name, base=base, base_digest=newest.base_digest, labels=labels, versions=versions)

    # ------------------------------------------------ labels, and an end

    async def promote(self, caller: Caller, name: str, wanted: Promotion) -> AdapterCard:
        """Requests that arrived before are answered with what they met."""
        await self._versions(caller, name)
        await self._change(name, partial(self.registry.promote, name, wanted.version, wanted.label))
        return await self.adapter(caller, name)

    async def rollback(self, caller: Caller, name: str, wanted: Rollback) -> AdapterCard:
        await self._versions(caller, name)
        await self._change(name, partial(self.registry.rollback, name, wanted.label))
        return await self.adapter(caller, name)

    async def forget(self, caller: Caller, reference: str, reason: str, children: Literal["forget", "keep"] | None) -> ForgetReceipt:
        """Delete a version or a whole name, on disk and in memory; what is being answered with it fails.

        Raises:
            AdapterError: others were made from it, and ``children`` does not say what is to become of them.
            Forbidden: the caller does not see all of these.
        """
        name, _, version = reference.partition("@")
        entries = await self._versions(caller, name)
        if version:
            entries = [await self.catalogue.find(caller, reference, "name")]
            reference = entries[0].reference
        if children != "keep" and not await asyncio.to_thread(self._sees_descendants, caller, entries):
            raise Forbidden(f"adapters that your key does not see were made from {reference}; give children=keep to leave them")
        receipt = await self._change(name, partial(self.registry.forget, reference, reason, children or "refuse"))
        await self.drop_forgotten()
        told = receipt.statement
        left = [copy for copy in told["left"] if not is_path(copy["what"]) and caller.sees(copy["what"].partition("@")[0])]
        return ForgetReceipt(
            receipt=receipt.path.name, signed_by=receipt.key, at=told["at"], reason=reason, forgotten=told["forgotten"], left=left
        )

    def _sees_descendants(self, caller: Caller, entries: Sequence[Entry]) -> bool:
        waiting, seen = list(entries), set[str]()
        while waiting:
            entry = waiting.pop()
            if not caller.sees(entry.name):
                return False
            if entry.reference not in seen:
                seen.add(entry.reference)
                waiting += self.registry.children(entry)
        return True

    async def drop_forgotten(self) -> None:
        """Take out of memory what was forgotten, by this process or another, unless another version has the same weights."""
        await asyncio.to_thread(self.registry.notice_forgotten)
        while self._forgotten:
            digest = self._forgotten.popleft()
            if not await asyncio.to_thread(self._is_known, digest):
                await self.loading.forget(digest)

    def _is_known(self, digest: str) -> bool:
        try:
            self.registry.resolve(f"sha256:{digest}")
        except AdapterError:
            return False
        return True

    async def watch(self) -> None:
        """Until cancelled, look for what other processes forget."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self.drop_forgotten()
            except Exception:
                LOG.exception("cannot ask the registry what was forgotten; it is asked again")

    async def _change(self, name: str, call: Callable[[], T]) -> T:
        """What the registry refuses is told as it says it: versions and labels of a name that the caller sees."""
        async with self._locks[name]:
            return await asyncio.to_thread(call)

    # ------------------------------------------------ in and out, as vLLM has it

    async def load(self, caller: Caller, wanted: LoadRequest) -> str:
        """Import a folder under a name, and load it.

        Raises:
            Forbidden: folders cannot be loaded here, or not this one, or not under this name.
            NotFound: there is no adapter in it.
            FieldError: the name is taken, or the adapter does not fit.
            StorageError: the disk is full.
        """
        name = wanted.lora_name
        check_name(name)
        if not caller.sees(name):
            raise Forbidden("your key does not allow adapters of this name")
        folder = await asyncio.to_thread(self._confined, wanted.lora_path)
        async with self._locks[name]:
            if self.catalogue.base(name) is not None:
                raise FieldError(f"{name!r} is the name of a base", "lora_name")
            taken = name not in self.catalogue.unloaded and await asyncio.to_thread(self.registry.versions, name)
            if taken and not wanted.load_inplace:
                advice = "If you want to load the adapter in place, set 'load_inplace' to True."
                raise FieldError(f"The lora adapter '{name}' has already been loaded. {advice}", "lora_name")
            served = self._base_for(folder, wanted)
            checkpoint, facts, signed = await asyncio.to_thread(self._read, folder, name, served)
            async with served.shelf.hold(checkpoint.adapter.digest, lambda: checkpoint) as loaded:  # it fits, or says why not
                if checkpoint.canary is None:
                    checkpoint = await served.shelf.worker.run(partial(served.record, loaded, checkpoint))
                await asyncio.to_thread(self._put, name, checkpoint, facts, signed)
            self.catalogue.unloaded.discard(name)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, caller: Caller, wanted: UnloadRequest) -> str:
        """Serve a name no more, until it is loaded again or the server starts anew; its files stay. What is being answered is answered."""
        name = wanted.lora_name
        try:
            check_name(name)
            entries = await self._versions(caller, name)
        except (AdapterError, NotFound) as error:
            raise UnknownModel(f"The lora adapter '{name}' cannot be found.", "lora_name") from error
        async with self._locks[name]:
            self.catalogue.unloaded.add(name)
            for entry in entries:
                for served in self.catalogue.bases.served:
                    served.shelf.release(entry.digest)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _confined(self, path: str) -> Path:
        """The folder that is meant, which lies inside of the operator's with everything that is in it."""
        if self.folder is None:
            raise Forbidden("this server loads no adapters from folders; its operator can name one: veneer serve --lora-dir")
        try:
            folder = (self.folder / path).resolve()
            if not folder.is_relative_to(self.folder):
                raise Forbidden("lora_path lies outside of the folder from which this server loads adapters")
            if not any((folder / name).is_file() for name in (CONFIG, MANIFEST)):
                raise UnknownModel(f"No adapter found for {path[:100]!r}: there is no {CONFIG} in that folder", "lora_path")
            if not all(file.resolve().is_relative_to(self.folder) for file in folder.iterdir()):
                raise Forbidden("lora_path holds a link that leads outside of the folder from which this server loads adapters")
        except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name that is too long, links in a circle
            raise FieldError("lora_path is no path of a folder", "lora_path") from error
        return folder

    def _base_for(self, folder: Path, wanted: LoadRequest) -> Served:
        if wanted.base_model is not None:
            return self.catalogue.bases.find(wanted.base_model)
        if len(self.catalogue.bases.served) == 1:
            return self.catalogue.bases.served[0]
        recorded = recorded_base(folder) or ""
        served = self.catalogue.base(recorded) or self.catalogue.base(Path(recorded).name)
        if served is None:
            raise FieldError(f"the folder names base {recorded!r}, which is none of this server's; give base_model", "base_model")
        return served

    def _read(self, folder: Path, name: str, served: Served) -> tuple[Checkpoint, dict[str, Any], bool]:
        """The adapter, what its manifest is to say, and whether this home vouches for it."""
        engine, renderer = served.engine, served.renderer
        digests = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest}
        origin = {**digests, "stage": "import", "imported_from": {"folder": folder.name}}
        if not (folder / MANIFEST).is_file():
            checkpoint, facts = read_peft(folder, name, engine.base_id, engine.base_digest)
            return checkpoint, {**facts, **origin}, False
        checkpoint, manifest = read_adapter(folder)
        entry = self.registry.resolve(str(folder))
        self.catalogue.check(entry, served, "lora_path")
        place = manifest.get("registry")
        parent = {"reference": f"{entry.name}@{place['version']}" if place else entry.name, "digest": entry.digest}
        return checkpoint, {**facts_of(manifest), **origin, "parents": [parent]}, entry.trusted

    def _put(self, name: str, checkpoint: Checkpoint, facts: dict[str, Any], signed: bool) -> None:
        """As a version that the name means from now on."""
        version = self.registry.put(name, checkpoint, facts, signed=signed)
        if self.registry.labels(name).get(LIVE, version) != version:
            self.registry.promote(name, version)


def _model(name: str, root: str, parent: str | None, served: Served, digests: ModelDigests, created: str | None = None) -> Model:
    return Model(
        id=name,
        object="model",
        created=0 if created is None else int(datetime.fromisoformat(created).timestamp()),
        owned_by="veneer",
        root=root,
        parent=parent,
        max_model_len=served.engine.context_length,
        veneer=digests,
    )


def _parent(caller: Caller, parent: Parent) -> dict[str, Any]:
    """By its digest alone if the caller may not know its name, or it was a folder."""
    known = not is_path(parent.reference) and caller.sees(parent.reference.partition("@")[0])
    return {**vars(parent), "reference": parent.reference if known else f"sha256:{parent.digest}"}
