"""browse, workflow and shop together: small enough for the bundled base, and shown as they are."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from world_play import ROOT, gold, recipe

from veneer.envs import ENVIRONMENTS, load_env
from veneer.render import Renderer, load_renderer
from veneer.types import Closable, Message, Solvable, Tokens

NAMES = ("browse", "workflow", "shop")
CONTEXT = 2048
"""Of the bundled base. An episode fits it also where the tokenizer spells every word of it letter by letter."""
FITTED = {"browse": 250, "workflow": 300, "shop": 550}
"""Most tokens of an episode where the texts of recipes/nano_worlds.py are tokens, thinking and slips included."""


@pytest.fixture(scope="module")
def plain() -> Renderer:
    return load_renderer("nano")


@pytest.fixture(scope="module")
def fitted() -> Renderer:
    """The bundled base's tokenizer with a token for each of the worlds' fixed texts and words."""
    renderer = load_renderer("nano")
    recipe("nano_worlds").fit(renderer.tokenizer)
    return renderer


async def closed(dataset: Any) -> None:
    if isinstance(dataset, Closable):
        await dataset.close()


def spoken(renderer: Renderer, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[int, list[Tokens]]:
    """Tokens of a whole conversation, and those of every assistant turn, up to its end-of-turn token."""
    text = str(renderer.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    turns = [part.partition("<|im_end|>")[0] + "<|im_end|>" for part in text.split("<|im_start|>assistant\n")[1:]]
    return len(renderer.encode(text)), [renderer.encode(turn) for turn in turns]


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_fits_a_small_base(name: str, plain: Renderer, fitted: Renderer) -> None:
    """A world that a base of a million parameters cannot hold is none that everybody can train on."""
    scripts = recipe("nano_worlds")

    async def main() -> None:
        dataset: Any = load_env(name)
        for index in range(30):
            shown = await dataset.env("train", index).initial_observation()
            assert len(fitted.build_generation_prompt(shown.messages, shown.tools)) <= 100
            messages, _ = await gold(dataset.env("train", index))
            tools = [dict(tool) for tool in shown.tools]
            assert spoken(plain, [dict(m) for m in messages], tools)[0] <= CONTEXT
            assert spoken(fitted, [dict(m) for m in messages], tools)[0] <= FITTED[name]
            for policy in (scripts.CAREFUL[name], scripts.CARELESS[name]):
                conversation, _ = await scripts.play(dataset.env("train", index), policy, random.Random(index))
                tokens, turns = spoken(fitted, *conversation)
                assert tokens <= FITTED[name]
                assert max(map(len, turns)) <= 60
        await closed(dataset)

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_are_what_a_model_would_write(name: str, fitted: Renderer) -> None:
    """Rendered, cut into turns and parsed, every turn is the action that was played: what is learned from it works in an episode."""
    scripts = recipe("nano_worlds")

    async def main() -> None:
        dataset: Any = load_env(name)
        rng = random.Random(0)
        for policy in (scripts.CAREFUL[name], scripts.CARELESS[name]):
            for _ in range(10):
                messages, tools = await scripts.demonstrate(rng, dataset, policy)
                actions = [message for message in messages if message["role"] == "assistant"]
                for action, tokens in zip(actions, spoken(fitted, messages, tools)[1], strict=True):
                    parsed: Message = fitted.parse_response(tokens, stopped=True)
                    thought = parsed.pop("reasoning_content", "")
                    assert thought == action.get("reasoning_content", "")
                    assert parsed == {key: value for key, value in action.items() if key != "reasoning_content"}
        await closed(dataset)

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_the_ways_part_at_the_first_token(name: str, fitted: Renderer) -> None:
    """The base's preference is set by weighing one token, so all careful demonstrations share one and all careless ones another."""
    scripts = recipe("nano_worlds")

    async def first_tokens(policy: Any, dataset: Any) -> set[str]:
        rng = random.Random(0)
        demonstrations = [await scripts.demonstrate(rng, dataset, policy) for _ in range(20)]
        return {fitted.decode(spoken(fitted, *each)[1][0][:1]) for each in demonstrations}

    async def main() -> None:
        dataset: Any = load_env(name)
        assert await first_tokens(scripts.CAREFUL[name], dataset) == {"<think>"}
        assert await first_tokens(scripts.CARELESS[name], dataset) == {"<tool_call>"}
        await closed(dataset)

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    """The registry's entry is the dataset, and gold is there for ``veneer env check``."""

    async def main() -> None:
        dataset = load_env(name, {"seed": 3})
        assert dataset.name == name
        assert name in ENVIRONMENTS
        assert isinstance(dataset.env("eval", 5), Solvable)
        await closed(dataset)

    asyncio.run(main())


def test_the_page_is_current() -> None:
    """docs/worlds.md, episodes and numbers included, is what recipes/worlds_docs.py writes."""
    assert (ROOT / "docs/worlds.md").read_text() == asyncio.run(recipe("worlds_docs").page()), "run: python recipes/worlds_docs.py"
