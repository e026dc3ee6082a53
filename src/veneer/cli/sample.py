"""``veneer sample``: the toggle."""

from __future__ import annotations

import click

from veneer.cli.output import emit, json_option


@click.command("sample", short_help="Ask the base, or the base with an adapter.")
@click.argument("prompt")
@click.option("--adapter", help="NAME, NAME@VERSION, NAME@LABEL or a folder. Without it the base answers.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option("-n", "count", type=click.IntRange(1), default=1, show_default=True, help="Completions.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--stop", multiple=True, help="A text that ends a completion. Repeatable.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def command(
    prompt: str,
    adapter: str | None,
    base: str,
    count: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: tuple[str, ...],
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Answer PROMPT as one chat turn, by the base alone or with an adapter: the same weights either way."""
    from veneer.cli.assemble import start_for
    from veneer.types import SamplingParams

    machine, name = start_for(adapter, base, threads, device)
    tokens = machine.renderer.build_generation_prompt([{"role": "user", "content": prompt}])
    params = SamplingParams(max_tokens, temperature, top_k, top_p, stop, seed=seed)
    samples = machine.engine.sample(tokens, name, params, count).result()
    used = samples[0].adapter
    document = {
        "base": machine.engine.base_id,
        "base_digest": machine.engine.base_digest,
        "adapter": None if used is None else {"name": used.name, "version": used.version, "digest": used.digest},
        "completions": [
            {
                "text": machine.renderer.decode(s.tokens),
                "tokens": s.tokens.tolist(),
                "logprobs": [float(p) for p in s.logprobs],
                "stop_reason": s.stop_reason,
            }
            for s in samples
        ],
    }

    def human() -> None:
        for completion in document["completions"]:
            print(completion["text"])

    emit(document, as_json, human)
