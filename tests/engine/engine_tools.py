"""Small builders that the engine tests share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers as hf

from tiny_models import random_model
from veneer.engine import Base, FullEngine, LocalEngine, LoraEngine
from veneer.engine.attention import Ragged, Row
from veneer.engine.flat import Flat, Segment
from veneer.types import AdamParams, Adapter, Checkpoint, Datum, LoraConfig, SamplingParams, Tokens

VOCAB = 97
POISON = 96
FREE = SamplingParams(max_tokens=8, stop_token_ids=())
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=())


def lora_engine(architecture: str = "qwen3", seed: int = 0) -> LocalEngine:
    return LoraEngine(Base(architecture, random_model(architecture, seed), None))


def full_engine(architecture: str = "qwen3", seed: int = 0) -> LocalEngine:
    return FullEngine(Base(architecture, random_model(architecture, seed), None))


def wide_model(seed: int = 0) -> hf.PreTrainedModel:
    """Llama with every linear map at least 32 wide on both sides, so that rank 32 fits."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = hf.LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=128, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def wide_engine() -> LocalEngine:
    return LoraEngine(Base("wide", wide_model(), None))


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng([seed, length]).integers(3, VOCAB, length)


def datum(length: int, seed: int = 0, adapter: Adapter | None = None) -> Datum:
    """A row of random tokens whose first third is prompt (mask 0) and whose weights and advantages vary."""
    rng = np.random.default_rng([7, seed, length])
    tokens = rng.integers(3, VOCAB, length + 1)
    mask = rng.uniform(0.5, 1.5, length).astype(np.float32)
    mask[: length // 3] = 0
    q, advantages = rng.normal(-4, 0.3, length), rng.normal(0, 1, length)
    return Datum(tokens[:-1], tokens[1:], np.where(mask > 0, q, 0).astype(np.float32), advantages.astype(np.float32), mask, adapter)


def sampled_datum(prompt_ids: Tokens, tokens: Tokens, logprobs: np.ndarray, adapter: Adapter | None) -> Datum:
    """The one-token shift of a sampled completion, written out independently of train/datums.py."""
    row = np.concatenate([prompt_ids, tokens])
    mask = np.zeros(len(row) - 1, np.float32)
    mask[len(prompt_ids) - 1 :] = 1
    q = np.zeros(len(row) - 1, np.float32)
    q[len(prompt_ids) - 1 :] = logprobs
    return Datum(row[:-1], row[1:], q, mask.copy(), mask, adapter)


def scrambled(checkpoint: Checkpoint, seed: int, scale: float = 0.1) -> Checkpoint:
    """The checkpoint with all weights, A and B, random and not zero."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(0, scale, array.shape).astype(np.float32) for name, array in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def add_random_adapter(engine: LocalEngine, name: str, config: LoraConfig, seed: int) -> None:
    """An adapter with random A and B, published."""
    engine.create_adapter(name, config)
    checkpoint = engine.save_state(name, "sampler").result()
    engine.load_state(name, scrambled(checkpoint, seed)).result()


def logits_of(engine: LocalEngine, slot: int | None, ids: torch.Tensor, *, published: bool = True) -> torch.Tensor:
    """All logits [rows, columns, vocab] of ids [rows, columns] under the published or the training weights of a slot."""
    device, (rows, columns) = engine.base.device, ids.shape
    places = torch.arange(ids.numel(), device=device)
    layout = Ragged([Row(i * columns, columns) for i in range(rows)], device, engine.base.window)
    count = [Segment(slot, ids.numel(), ids.numel())]
    flat = Flat(ids.reshape(-1).to(device), places % columns, layout, count, places)
    return engine._stack.infer(flat, lambda hidden, head: head(hidden, 0), published=published).view(rows, columns, -1)


def count_passes(engine: LocalEngine) -> list[int]:
    """A list that grows by the length of the line with every pass through the base."""
    calls: list[int] = []
    stack = engine._stack
    infer, train = stack.infer, stack.train

    def counted(run):
        def counting(flat, *args, **kwargs):
            calls.append(len(flat.tokens))
            return run(flat, *args, **kwargs)

        return counting

    stack.infer, stack.train = counted(infer), counted(train)
    return calls


def slot_of(engine: LocalEngine, name: str) -> int:
    return engine._slots[name].slot


def gradients(engine: LocalEngine, name: str) -> dict[str, torch.Tensor]:
    """Copies of the gathered gradient, by PEFT's names."""
    named = engine._stack.named(slot_of(engine, name), engine._stack.rows.open(slot_of(engine, name)).grad)
    return {key: tensor.detach().clone() for key, tensor in named.items()}


FIELDS = ("weights", "published", "grad", "m", "v")


def row_bytes(engine: LocalEngine, name: str, fields: Sequence[str] = FIELDS) -> dict[str, bytes]:
    """Everything that the engine holds for an adapter, byte by byte."""
    return {field: row.tobytes() for field, row in rows_of_adapter(engine, name).items() if field in fields}


def rows_of_adapter(engine: LocalEngine, name: str) -> dict[str, np.ndarray]:
    """Copies of the weights, published and in training, of the gradient and of the moments, [size] each: what nobody has trained
    has its published weights and zeros."""
    rows, slot = engine._stack.rows, slot_of(engine, name)
    kept = dict.fromkeys(("grad", "m", "v"), torch.zeros(rows.size(slot))) | {
        "weights": rows.training(slot),
        "published": rows.published(slot),
    }
    if slot in rows.trained:
        kept |= {field: getattr(rows.trained[slot], field) for field in ("grad", "m", "v")}
    return {field: kept[field].cpu().numpy().copy() for field in FIELDS}


def no_gradients(engine: LocalEngine) -> bool:
    return not any(state.grad.any() for state in engine._stack.rows.trained.values())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted| in the L2 norm."""
    assert found.shape == wanted.shape
    size = torch.linalg.vector_norm(wanted)
    assert size > 0, "a zero reference proves nothing"
    return float(torch.linalg.vector_norm(found - wanted) / size)


def target_logprobs(model: hf.PreTrainedModel, row: Datum) -> torch.Tensor:
    """transformers' log-probability of every target [N]."""
    logits = model(input_ids=torch.from_numpy(row.tokens)[None]).logits[0].float()
    return logits.log_softmax(-1)[torch.arange(len(row.targets)), torch.from_numpy(row.targets)]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One experiment: an adapter that samples, trains on what it drew, and publishes, ``rounds`` times."""

    name: str
    rank: int = 4
    lengths: tuple[int, ...] = (5, 12)
    budgets: tuple[int, ...] = (7, 4)
    n: int = 2
    rounds: int = 2
    stops: bool = False
    scored: bool = False
    temperature: float = 1.0
    loss: str = "importance_sampling"
    clip: float = 1.0
    fails_after: int | None = None
    """Raise once that many rounds are through."""

    @property
    def seed(self) -> int:
        return sum(self.name.encode())


async def live(engine: LocalEngine, loop: Loop) -> dict[str, object]:
    """Run a loop; everything that it was told, by what it is, as bytes or numbers."""
    told: dict[str, object] = {}
    engine.create_adapter(loop.name, LoraConfig(rank=loop.rank, alpha=2 * loop.rank, seed=loop.seed))
    for turn in range(loop.rounds):
        if turn == loop.fails_after:
            raise ValueError(f"loop {loop.name} has a bug")
        asked = []
        for length, budget in zip(loop.lengths, loop.budgets, strict=True):
            stop = tuple(range(3, 20)) if loop.stops else ()
            params = SamplingParams(budget, temperature=loop.temperature, stop_token_ids=stop, seed=loop.seed + turn)
            ids = prompt(length, loop.seed + turn)
            asked.append((ids, engine.sample(ids, loop.name, params, loop.n, prompt_logprobs=loop.scored)))
        data = []
        for i, (ids, future) in enumerate(asked):
            for j, sample in enumerate(await future):
                told[f"{turn} tokens {i} {j}"] = sample.tokens.tolist()
                told[f"{turn} logprobs {i} {j}"] = sample.logprobs.tobytes()
                told[f"{turn} prompt_logprobs {i} {j}"] = None if sample.prompt_logprobs is None else sample.prompt_logprobs.tobytes()
                row = sampled_datum(ids, sample.tokens, sample.logprobs, sample.adapter)
                data.append(dataclasses.replace(row, advantages=row.advantages * np.float32(1 + i - 0.7 * j)))
        output = await engine.forward_backward(loop.name, data, loop.loss)
        told[f"{turn} metrics"] = dict(output.metrics)
        told |= {f"{turn} trained logprobs {i}": row.tobytes() for i, row in enumerate(output.logprobs_D)}
        told |= {f"{turn} gradient {name}": g.numpy().tobytes() for name, g in gradients(engine, loop.name).items()}
        step = AdamParams(learning_rate=2e-2, grad_clip_norm=loop.clip, weight_decay=0.1)
        told[f"{turn} grad norm"] = (await engine.optim_step(loop.name, step))["grad_norm"]
        told[f"{turn} digest"] = (await engine.publish(loop.name)).digest
    state = await engine.save_state(loop.name)
    return told | {name: array.tobytes() for part in (state.weights, state.optimizer) for name, array in part.items()}


def together(engine: LocalEngine, loops: Sequence[Loop]) -> list[dict[str, object] | BaseException]:
    """Run loops side by side; a loop that fails gives its error."""

    async def all_of_them() -> list[dict[str, object] | BaseException]:
        return await asyncio.gather(*(live(engine, loop) for loop in loops), return_exceptions=True)

    return asyncio.run(all_of_them())


def differences(found: dict[str, object] | BaseException, wanted: dict[str, object]) -> list[str]:
    """What is not the same to the last bit, first things first."""
    assert isinstance(found, dict), found
    assert list(found) == list(wanted)
    return [name for name in wanted if found[name] != wanted[name]]


def drain(engine: LocalEngine) -> None:
    """Let the engine come to rest."""
    for _ in range(3):
        engine.step()


def finish(engine: LocalEngine, futures: list) -> None:
    """Step until all are answered, but not for ever."""
    for _ in range(300):
        if all(future.done() for future in futures):
            return
        engine.step()
    raise AssertionError(f"{sum(not future.done() for future in futures)} requests have no answer after 300 steps")


def at_rest(engine: LocalEngine) -> bool:
    """Nothing is queued, running or kept."""
    drain(engine)
    used = [bank.used for crew in engine._sampler.crews for bank in crew.banks.values()]
    return not engine._queue and not engine._sampling and engine._sampler.idle and not any(used)


def break_passes(engine: LocalEngine, breaks: Callable[[object], Exception | None]) -> None:
    """Passes for which ``breaks`` gives an error fail with it."""
    stack = engine._stack

    def broken(run):
        def maybe(flat, *args, **kwargs):
            error = breaks(flat)
            if error is not None:
                raise error
            return run(flat, *args, **kwargs)

        return maybe

    stack.infer, stack.train = broken(stack.infer), broken(stack.train)


def memory_for(tokens: int) -> Callable[[object], Exception | None]:
    return lambda flat: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate") if len(flat.tokens) > tokens else None


def poisoned(flat) -> Exception | None:
    return ValueError("a kernel choked") if bool((flat.tokens == POISON).any()) else None


def clean(length: int, seed: int = 0):
    """A datum without the poison."""
    row = datum(length, seed)
    for array in (row.tokens, row.targets):
        array[array == POISON] = 4
    return row
