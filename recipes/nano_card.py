"""Measure veneer-nano's base rates and write its card: ten minutes of one CPU core.

    python recipes/nano_card.py            # writes src/veneer/assets/nano/README.md

Rates are those of plain sampling at temperature 1 on problems of the eval split, which are held out from reinforcement
learning but not from pretraining, with Wilson intervals. pass@64 of the sums is the
share of problems that at least one of 64 samples solves.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from pages import ROOT, rate
from veneer.engine import LoraEngine, load_base, set_threads
from veneer.envs import load_env
from veneer.envs.calculator import CALCULATOR
from veneer.measure.intervals import wilson
from veneer.render import load_renderer
from veneer.train.evaluate import Evaluation, evaluate
from veneer.train.rollouts import Policy, closing, do_rollouts
from veneer.types import Message, SamplingParams

NANO = ROOT / "src/veneer/assets/nano"
EXAMPLES = {"arithmetic": "`27+94+38=?`", "sort": "`sort 739562`", "reverse": "`reverse 739562`", "count": "`count 3 in 7313390`"}
EXAMPLES |= {"calculator": "`47*86=?` with a calculator in Qwen3's tool format"}
EXAMPLES |= {
    "browse": "`home of the owner of the blue chair?` on a website",
    "workflow": "a plan of eight tasks, one that fails, one in spare",
}
EXAMPLES |= {"shop": "twenty days of prices and orders"}


def card(
    rates: dict[str, Evaluation], solved_at_64: str, problems_64: int, pretraining: dict[str, dict[str, object]], parameters: int
) -> str:
    base, renderer = load_base("nano"), load_renderer("nano")
    first, then = pretraining["pretraining"], pretraining["teaching"]
    question: list[Message] = [{"role": "user", "content": "47*86=?"}]
    with_tool, without = (renderer.decode(renderer.build_generation_prompt(question, tools)) for tools in ([CALCULATOR], []))
    tool_tokens = renderer.encode(with_tool).size - renderer.encode(without).size
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "# veneer-nano",
        "",
        f"The base that comes with Veneer: a Qwen3 of {parameters:,} parameters, trained from scratch by `make nano`, that is by",
        "`recipes/pretrain_nano.py` and `recipes/teach_nano.py`",
        f"({first['steps']} steps of {first['rows']} demonstrations on {first['device']} with seed {first['seed']}, then {then['steps']}",
        f"of {then['rows']} with seed {then['seed']}, torch {then['torch']}). It loads with plain `AutoModelForCausalLM` and",
        f"`AutoTokenizer`. Base digest `{base.digest[:16]}`.",
        "",
        "It knows five small skills and three worlds to act in, each in a careful way that works and a careless way that mostly does",
        "not, and prefers the careless one: latent and unreliable, as behaviours are after pretraining. Reinforcement learning makes",
        "them reliable. It knows no natural language. Its demonstrations of the five skills were drawn from all problems, those that",
        "Veneer holds out among them; those of the worlds from training problems alone.",
        "",
        f"| environment | a problem | pass@1, temperature 1, {next(iter(rates.values())).solved.trials} held-out problems | thinks first |",
        "|---|---|---|---|",
    ]
    for name, result in rates.items():
        first_actions = [t.transitions[0].action for t in result.trajectories if t.transitions]
        careful = sum(bool(action.get("reasoning_content")) for action in first_actions) / len(first_actions)
        kind = "" if result.reward.value == result.solved.value else "mean reward "
        lines.append(f"| `{name}` | {EXAMPLES[name]} | {kind}{rate(vars(result.reward))} | {careful:.2f} |")
    slips = rates["arithmetic"].means["env/self_corrected"]
    lines += [
        "",
        f"Of the sums, {slips:.3f} are answered step by step with a slip that is noticed and taken back. pass@64 on {problems_64} sums:",
        f"{solved_at_64}.",
        "",
        "The tokenizer works on bytes, with a few merges, single digits, and Qwen3's special tokens and chat template (Qwen team,",
        "Apache-2.0). The fixed sentences of Qwen3's tool prompt are tokens of their own: the calculator's",
        f"{len(with_tool.encode()) - len(without.encode())} bytes are {tool_tokens} tokens.",
        "",
    ]
    return "\n".join(lines)


async def score(policy: Policy, name: str, problems: int) -> Evaluation:
    async with closing(load_env(name)) as dataset:
        return await evaluate(policy, dataset, problems, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1024)
    parser.add_argument("--problems-64", type=int, default=128)
    args = parser.parse_args()
    set_threads(1)
    base = load_base("nano")
    policy = Policy(LoraEngine(base), load_renderer("nano"), None, SamplingParams(max_tokens=96))
    rates = {}
    for name in EXAMPLES:
        rates[name] = asyncio.run(score(policy, name, args.problems if name != "shop" else min(args.problems, 256)))
        print(name, rates[name].solved, flush=True)
    groups = asyncio.run(do_rollouts(policy, load_env("arithmetic"), "eval", range(args.problems_64), 64, seed=1))
    solved = wilson(sum(max(group.rewards_G) >= 1 for group in groups), len(groups))
    print("pass@64", solved, flush=True)
    pretraining = json.loads((NANO / "pretraining.json").read_text())
    parameters = sum(p.numel() for p in base.model.parameters())
    (NANO / "README.md").write_text(card(rates, str(solved), args.problems_64, pretraining, parameters))


if __name__ == "__main__":
    main()
