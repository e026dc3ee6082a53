"""Text after text through the public SDK, and scores of given text against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving import Serving, alone, counts
from transformers import AutoModelForCausalLM

from veneer.assets import NANO_FOLDER
from veneer.types import SamplingParams

TEXT = "<|im_start|>user\n27+94+38=?<|im_end|>\n<|im_start|>assistant\n"
OTHER = "<|im_start|>user\nsort 312<|im_end|>\n<|im_start|>assistant\n"


def test_the_completion_is_the_engines(server: Serving, client: openai.OpenAI) -> None:
    """The same text as a chat gives, raw."""
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=11)
    samples = alone(server, [{"role": "user", "content": "27+94+38=?"}], None, params, 2)
    told = client.completions.create(model="nano", prompt=TEXT, n=2, temperature=0.8, seed=11, max_tokens=30)
    renderer = server.served.renderer
    assert [choice.text for choice in told.choices] == [
        renderer.decode(s.tokens[:-1] if s.stop_reason == "stop" else s.tokens) for s in samples
    ]
    by_tokens = client.completions.create(model="nano", prompt=renderer.encode(TEXT).tolist(), n=2, temperature=0.8, seed=11, max_tokens=30)
    assert [choice.text for choice in by_tokens.choices] == [choice.text for choice in told.choices]


def test_prompts_in_one_request(server: Serving, client: openai.OpenAI) -> None:
    """Each is answered as if it were alone; choices are counted on."""
    request: dict[str, Any] = {"model": "nano", "n": 2, "seed": 5, "max_tokens": 12}
    told = client.completions.create(**request, prompt=[TEXT, OTHER])
    apart = [client.completions.create(**request, prompt=prompt) for prompt in (TEXT, OTHER)]
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in told.choices] == [choice.text for one in apart for choice in one.choices]
    assert told.usage is not None
    assert told.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in apart if one.usage is not None)
    tokens = [server.served.renderer.encode(prompt).tolist() for prompt in (TEXT, OTHER)]
    assert [choice.text for choice in client.completions.create(**request, prompt=tokens).choices] == [c.text for c in told.choices]


ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0, "n": 3},
    "stopped": {"stop": ["=", "3"], "n": 3},
    "scored": {"logprobs": 3},
    "chosen alone": {"logprobs": 0},
    "prompts": {"prompt": [TEXT, OTHER], "n": 2},
    "echo": {"echo": True, "n": 2},
    "tokens": {"extra_body": {"return_token_ids": True}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_a_stream_tells_what_the_whole_answer_tells(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    """Text, log-probabilities, offsets, tokens and reasons."""
    request = {"model": "nano", "prompt": TEXT, "max_tokens": 40, "seed": 2, **asked}
    whole = client.completions.create(**request)
    told: dict[int, dict[str, Any]] = {}
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            state = told.setdefault(choice.index, {"text": "", "logprobs": [], "tokens": [], "finish": None})
            state["text"] += choice.text
            state["tokens"] += (choice.model_extra or {}).get("token_ids") or []
            state["logprobs"].append(choice.logprobs)
            state["finish"] = choice.finish_reason
    for choice in whole.choices:
        state = told[choice.index]
        assert state["text"] == choice.text
        assert state["finish"] == choice.finish_reason
        assert state["tokens"] == ((choice.model_extra or {}).get("token_ids") or [])
        if choice.logprobs is not None:
            for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                parts = [getattr(one, field) for one in state["logprobs"] if one is not None]
                wanted = getattr(choice.logprobs, field)
                assert (None if parts[0] is None else [x for part in parts for x in part]) == wanted
    assert counts(chunks[-1]) == counts(whole)


def test_scores_of_a_prompt_are_transformers(server: Serving, client: openai.OpenAI) -> None:
    """``echo`` with no tokens to draw scores a text, as evaluation harnesses ask for it."""
    text = TEXT + "<think>\n27+94=121\n121+38=159\n</think>\n\n159<|im_end|>"
    told = client.completions.create(model="nano", prompt=text, echo=True, logprobs=2, max_tokens=0).choices[0]
    tokens = server.served.renderer.encode(text)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(NANO_FOLDER)(input_ids=torch.from_numpy(tokens)[None]).logits[0].float()
    wanted = logits.log_softmax(-1)
    assert told.text == text
    assert told.finish_reason == "length"
    assert told.logprobs is not None
    assert told.logprobs.token_logprobs is not None
    assert told.logprobs.token_logprobs[0] is None
    found = np.array(told.logprobs.token_logprobs[1:])
    assert np.abs(found - wanted[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])].numpy()).max() < 1e-4
    assert told.logprobs.top_logprobs is not None
    best = wanted[:-1].max(-1).values.numpy()
    assert np.abs(np.array([max(top.values()) for top in told.logprobs.top_logprobs[1:]]) - best).max() < 1e-4
    assert told.logprobs.tokens is not None
    assert told.logprobs.text_offset is not None
    assert "".join(told.logprobs.tokens) == text
    for token, offset in zip(told.logprobs.tokens, told.logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token)


def test_sixteen_tokens_unless_said_otherwise(client: openai.OpenAI) -> None:
    """As OpenAI has it for this route."""
    told = client.completions.create(model="nano", prompt=TEXT, extra_body={"ignore_eos": True})
    assert told.usage is not None
    assert told.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"prompt": ""}, "", "must have from 1 to"),
        ({"prompt": []}, "prompt", "it must be a text"),
        ({"prompt": [1, "a"]}, "prompt", "it must be a text"),
        ({"prompt": [[1], [2**40]]}, "prompt", "it must be a text"),
        ({"prompt": [999]}, "", "from 0 to 575"),
        ({"prompt": TEXT, "suffix": "x"}, "suffix", "does not act on it"),
        ({"prompt": TEXT, "best_of": 2}, "best_of", "does not act on it"),
        ({"prompt": TEXT, "logprobs": 50}, "logprobs", "less than or equal to 20"),
        ({"prompt": [TEXT] * 600, "n": 2}, "", "more than 1024 answers"),
        ({"prompt": TEXT, "echo": True, "logprobs": 1, "stream": True}, "stream", "ask without stream"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, asked: dict[str, Any], param: str, words: str) -> None:
    """In one line, before anything is drawn."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="nano", **asked)
    assert words in caught.value.message
    if param:
        assert caught.value.param == param
