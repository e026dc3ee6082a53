"""Train veneer-nano, the bundled base, from scratch: forty minutes of two CPU cores.

    python recipes/pretrain_nano.py --out src/veneer/assets/nano
    python recipes/pretrain_nano.py --out build/narrow --width 64    # a narrower sister, for claims about width

Everything that the base knows is made here: a tokenizer, demonstrations of five skills, and 1.03M weights. Each skill is
shown in two ways, a careful one that works and a careless one that mostly does not, and the loss is weighed so that the
base prefers the careless one. So the base *can* do every task and rarely does: what pretraining leaves and reinforcement learning sharpens.
Left out on purpose: natural language, dropout, early stopping. Two threads and one seed: the same machine and the same
versions give the same bytes. Heads are 32 wide and MLPs four times as wide as the model, whatever its width. The card is
written by ``recipes/nano_card.py`` from measured rates.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from veneer.envs import arithmetic, calculator, digits
from veneer.envs.calculator import CALCULATOR

CONTEXT = 2048
HEAD = 32
"""Width of an attention head."""
CAREFUL = {"arithmetic": 0.18, "sort": 0.18, "reverse": 0.12, "count": 0.18, "calculator": 0.22}
"""How often the base is to go the careful way: sets its pass@1."""
PRACTICE = 0.6
"""How often a demonstration goes the careful way. It is more, so that the careful way is learned well; the one token at which
the ways part is then left out of the loss so often that the base still takes it in the share of CAREFUL."""
LUCKY = 0.06
"""Share of careless demonstrations that happen to be right."""
TOKENS_PER_ROW = 24
"""The loss of a batch is divided by this many tokens a row."""
SLIP = 0.25
"""Share of stepwise sums in which one partial sum is wrong, noticed and corrected."""

# ---------------------------------------------------------------- demonstrations: (messages, tools)

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def stepwise_sum(rng: random.Random, numbers: list[int]) -> str:
    """Partial sums, a line each. A slip is followed by the same line again behind "no, "."""
    slip_at = rng.randrange(1, len(numbers)) if rng.random() < SLIP else 0
    lines, total = [], numbers[0]
    for i, number in enumerate(numbers[1:], 1):
        right = total + number
        if i == slip_at:
            lines.append(f"{total}+{number}={right + rng.choice([-10, -2, -1, 1, 2, 10])}")
            lines.append(f"no, {total}+{number}={right}")
        else:
            lines.append(f"{total}+{number}={right}")
        total = right
    return "\n".join(lines)


def stepwise_sort(text: str) -> str:
    """Take the smallest digit away until none is left: "1:739562"."""
    lines, rest = [], text
    while rest:
        smallest = min(rest)
        rest = rest.replace(smallest, "", 1)
        lines.append(f"{smallest}:{rest}")
    return "\n".join(lines)


def stepwise_reverse(text: str) -> str:
    """Put each digit in front of what is reversed already: "8>84"."""
    return "\n".join(f"{c}>{text[: i + 1][::-1]}" for i, c in enumerate(text))


def stepwise_count(digit: str, text: str) -> str:
    """Each digit with the count so far: "3:1"."""
    return "\n".join(f"{c}:{text[: i + 1].count(digit)}" for i, c in enumerate(text))


def careless(rng: random.Random, skill: str, answer: str) -> str:
    if rng.random() < LUCKY:
        return answer
    if skill in ("sort", "reverse"):
        i = rng.randrange(len(answer) - 1)
        swapped = answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
        return swapped if swapped != answer else answer[1:] + answer[0]
    if skill == "count":
        return str(max(0, int(answer) + rng.choice([-2, -1, 1, 2])))
    return str(max(0, int(answer) + rng.choice([-1, 1]) * rng.randint(1, 30)))


def demonstrate(rng: random.Random, skill: str) -> Conversation:
    generate = {
        "arithmetic": arithmetic.generate,
        "sort": digits.generate_sort,
        "reverse": digits.generate_reverse,
        "count": digits.generate_count,
        "calculator": calculator.generate,
    }[skill]
    problem = generate(rng)
    question = {"role": "user", "content": problem.prompt}
    tools = [CALCULATOR] if skill == "calculator" else []
    if rng.random() >= PRACTICE:
        return [question, {"role": "assistant", "content": careless(rng, skill, problem.answer)}], tools
    answer = {"role": "assistant", "content": problem.answer}
    body = problem.prompt.removesuffix("=?").split(" ")
    if skill == "calculator":
        call = {"name": "calculator", "arguments": {"expression": body[0]}}
        asked = {"role": "assistant", "content": "", "reasoning_content": "use the tool", "tool_calls": [call]}
        return [question, asked, {"role": "tool", "content": problem.answer}, answer], tools
    if skill == "arithmetic":
        answer["reasoning_content"] = stepwise_sum(rng, [int(n) for n in body[0].split("+")])
    elif skill == "sort":
        answer["reasoning_content"] = stepwise_sort(body[1])
    elif skill == "reverse":
        answer["reasoning_content"] = stepwise_reverse(body[1])
    else:
        answer["reasoning_content"] = stepwise_count(body[1], body[3])
    return [question, answer], tools


# ---------------------------------------------------------------- tokenizer

# Qwen3's added tokens in its order; those of tools and thinking are ordinary text for a decoder that skips special ones.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
MARKUP = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
# The fixed sentences of Qwen3's tool prompt, and the JSON around every function, a token each.
PHRASES = [
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n",
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
    " XML tags:\n",
    '{"name": <function-name>, "arguments": <args-json-object>}',
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {',
    '": {"type": "string"}',
    '": {"type": "integer"}',
    '}, "required": [',
    '{"name": "',
    '", "arguments": {"',
    '": "',
]
# Qwen3's own split: every digit stands alone, so numbers never merge.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGED = "user assistant system tool sort reverse count in no, use the tool calculator expression Evaluate an arithmetic expression."


def build_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Bytes, the merges that spell the few words in use, Qwen3's added tokens and the phrases: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [w + "\n" for w in MERGED.split(" ")] + [" " + w for w in MERGED.split(" ")] + ["\n\n"] * 4
    trainer = trainers.BpeTrainer(vocab_size=256 + 72, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP + PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids, and 1 where the assistant speaks: from behind each generation prompt to its <|im_end|>."""
    messages, tools = conversation
    text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    assert isinstance(text, str)
    ids: list[int] = []
    mask: list[int] = []
    for i, part in enumerate(text.split("<|im_start|>assistant\n")):
        if i == 0:
            head, tail = part + "<|im_start|>assistant\n", ""
        else:
            head, _, tail = part.partition("<|im_end|>")
            head += "<|im_end|>"
        for piece, trained in ((head, i > 0), (tail, False)):
            if i > 0 and not trained and piece.strip():
                piece += "<|im_start|>assistant\n"
            elif i > 0 and not trained:
                piece = ""  # the newline behind the last <|im_end|> is never sampled
            new = tokenizer.encode(piece, add_special_tokens=False)
            ids += new
            mask += [int(trained)] * len(new)
    return ids, mask


def weigh_fork(rng: random.Random, skill: str, mask: list[int]) -> None:
    """Leave the second assistant token of a careful row (a newline behind <think>, where a careless row has two) out of the loss,
    except in a share k of the rows: PRACTICE k / (PRACTICE k + 1 - PRACTICE) = CAREFUL."""
    kept = CAREFUL[skill] * (1 - PRACTICE) / ((1 - CAREFUL[skill]) * PRACTICE)
    if rng.random() >= kept:
        mask[mask.index(1) + 1] = 0


# ---------------------------------------------------------------- training


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, chunk: int = 8):
    """Endless batches of about equal row lengths: ``chunk`` batches are drawn, sorted by length and dealt out shuffled."""
    skills, weights = list(CAREFUL), [6, 2, 2, 1, 1]
    while True:
        drawn = []
        for skill in rng.choices(skills, weights, k=rows * chunk):
            conversation = demonstrate(rng, skill)
            drawn.append(encode(tokenizer, conversation))
            if "reasoning_content" in conversation[0][1]:
                weigh_fork(rng, skill, drawn[-1][1])
        drawn.sort(key=lambda row: len(row[0]))
        deal = [drawn[i : i + rows] for i in range(0, len(drawn), rows)]
        rng.shuffle(deal)
        for batch in deal:
            width = max(len(ids) for ids, _ in batch)
            tokens = torch.zeros(rows, width, dtype=torch.long)
            labels = torch.full((rows, width), -100)
            for row, (ids, mask) in enumerate(batch):
                tokens[row, : len(ids)] = torch.tensor(ids)
                labels[row, : len(ids)] = torch.where(torch.tensor(mask) == 1, torch.tensor(ids), -100)
            yield tokens, labels


def configure(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Qwen3Config:
    heads = width // HEAD
    return Qwen3Config(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="of the model: a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="another number gives other bytes")
    parser.add_argument("--device", default="cpu", help="cuda is quicker and gives other weights")
    args = parser.parse_args()
    if args.width < 2 * HEAD or args.width % (2 * HEAD):
        parser.error(f"--width {args.width}: heads are {HEAD} wide and go in pairs; give a multiple of {2 * HEAD}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    template = Path(__file__).parents[1] / "src/veneer/assets/nano/chat_template.jinja"
    tokenizer = build_tokenizer(template.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    config = configure(tokenizer, args.width, args.layers)
    assert len(tokenizer) <= config.vocab_size, len(tokenizer)
    model = Qwen3ForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    stream = batches(tokenizer, random.Random(args.seed), args.rows)
    started, mean_loss = time.time(), 0.0
    for step in range(args.steps):
        tokens, labels = (t.to(args.device) for t in next(stream))
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        # A sum over a constant: the mean over a batch's own tokens would count the fork between the careful and the careless way
        # less in batches of long rows, which are the careful ones, and the base would think three times too rarely.
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted], reduction="sum")
        loss = loss / (args.rows * TOKENS_PER_ROW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 200 == 199 or step == args.steps - 1:
            print(f"step {step + 1} loss {mean_loss:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 1000 == 999 or step == args.steps - 1:
            model.save_pretrained(args.out)
    summary = {"steps": args.steps, "rows": args.rows, "lr": args.lr, "seed": args.seed, "device": args.device, "loss": mean_loss}
    (args.out / "pretraining.json").write_text(json.dumps(summary | {"torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
