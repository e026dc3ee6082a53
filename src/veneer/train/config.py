"""What a run is told: one TOML file, dotted overrides, and a resolved copy beside the results."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer.assets import NANO
from veneer.types import ConfigError, LoraConfig


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSettings(Settings):
    rank: int = Field(default=8, ge=1)
    """Width of the adapter; 1 is enough for most reinforcement learning."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank, so a learning rate carries over between ranks."""
    train_attn: bool = True
    """Adapt the linear maps of attention."""
    train_mlp: bool = True
    """Adapt the linear maps of the MLPs."""
    train_unembed: bool = False
    """Adapt the unembedding."""
    target_modules: tuple[str, ...] = ()
    """Endings of module names; replaces the three switches."""


class EnvSettings(Settings):
    name: str = "arithmetic"
    """A built-in environment, FAMILY:ID of another library, or FILE.py:FACTORY."""
    args: dict[str, Any] = {}
    """Arguments of the environment."""
    seconds: float = Field(default=10.0, gt=0)
    """An environment call that takes longer fails its rollout."""
    retries: int = Field(default=0, ge=0)
    """How often a rollout that failed is played anew."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """A step in which a larger share of the rollouts failed ends the run."""


class RlSettings(Settings):
    steps: int = Field(default=80, ge=0)
    """Steps: batches of episodes."""
    groups_per_batch: int = Field(default=8, ge=1)
    """Problems a step."""
    group_size: int = Field(default=8, ge=2)
    """Episodes of each problem: what advantages are centred over."""
    max_tokens: int = Field(default=72, ge=1)
    """Length limit of one turn."""
    learning_rate: float = Field(default=1.5e-3, ge=0)
    """Constant. About ten times that of full fine-tuning, less in narrow models: ``veneer plan`` says."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """0 is off."""
    advantage: str = "group_mean"
    """How rewards become advantages: group_mean, grpo, rloo, rloo_length, reinforce, reinforce_plus_plus,
    reinforce_plus_plus_baseline, pass_at_k or turn."""
    advantage_config: dict[str, float] = {}
    """Settings of the advantage, such as k of pass_at_k."""
    loss: Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"] = "importance_sampling"
    """importance_sampling, ppo, cispo, dro or gspo."""
    loss_config: dict[str, float] = {}
    """Settings of the loss, such as clip_high_threshold."""
    normalise: Literal["episodes", "sequence_mean", "token_mean", "max_tokens"] = "episodes"
    """What the sum over tokens is divided by: episodes, sequence_mean, token_mean or max_tokens."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Keeps the adapter near the base: the weight of the KL divergence to it. The base is the same model with the adapter off."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether the KL is a term of the loss or taken from each token's advantage."""
    kl_estimator: Literal[1, 2, 3] = 3
    """Schulman's k1, k2 or k3."""
    kl_discount: float = Field(default=0.0, ge=0, le=1)
    """In the reward: 0 charges each token for its own KL, 1 for all that follows too (REINFORCE++)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy of the next token, as a bonus."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """What is done where the trainer's probabilities are not the sampler's: importance weights, cut off or dropped outside bounds."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether a weight is a token's or an episode's."""
    correction_config: dict[str, float] = {}
    """Its bounds: low and high."""
    mask_truncated: bool = False
    """Episodes that ran into a length limit count for the others' baseline and are not trained on."""
    soft_overlong: int = Field(default=0, ge=0)
    """The last so many tokens below max_tokens cost reward, up to 1 (DAPO); 0 is off."""
    refill: float = Field(default=0.0, ge=0)
    """Replace useless groups (dynamic sampling): at most so many times groups_per_batch further problems a step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a step's episodes."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps a pass."""
    max_lag: int = Field(default=0, ge=0)
    """Sampling goes on while training does, up to so many steps behind the weights that it trains; 0 waits for each other."""
    max_useless_steps: int = Field(default=8, ge=1)
    """Stop after this many steps in a row in which no group had two different rewards."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.refill and self.max_lag:
            raise ValueError("refill and max_lag exclude each other: groups in flight are played before anybody knows which are useless")
        if self.soft_overlong >= self.max_tokens:
            raise ValueError(f"soft_overlong must be smaller than max_tokens = {self.max_tokens}")
        if self.minibatches > self.groups_per_batch * self.group_size:
            raise ValueError("there are more minibatches than episodes a step")
        return self


class SftSettings(Settings):
    data: str = ""
    """A jsonl file; each line has "messages", or "prompt" and "completion", and perhaps "tools"."""
    train_on: Literal["all_assistant_messages", "last_assistant_message"] = "all_assistant_messages"
    """all_assistant_messages or last_assistant_message; never those of a "prompt"."""
    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Conversations a step."""
    learning_rate: float = Field(default=1e-3, ge=0)
    """Constant."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """0 is off."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the lines, chosen by their text, that is kept for evaluation."""


class DpoSettings(Settings):
    data: str = ""
    """A jsonl file; each line has "prompt", "chosen" and "rejected", or the last two alone, and perhaps "tools"."""
    beta: float = Field(default=0.1, gt=0)
    """How dear it is to leave the reference; a smaller one lets the policy go further."""
    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs a step."""
    learning_rate: float = Field(default=3e-4, ge=0)
    """Constant."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """0 is off."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the lines, chosen by their text, that is kept for evaluation."""


class RejectionSettings(Settings):
    rounds: int = Field(default=1, ge=1)
    """How often episodes are sampled anew, each time from what the rounds before have trained."""
    problems: int = Field(default=128, ge=1)
    """Problems a round."""
    group_size: int = Field(default=8, ge=1)
    """Episodes of each problem."""
    max_tokens: int = Field(default=72, ge=1)
    """Length limit of one turn."""
    bar: float = 1.0
    """The reward that an episode must reach to be kept."""
    keep: int = Field(default=2, ge=1)
    """At most so many different episodes of a problem are kept."""
    steps: int = Field(default=40, ge=1)
    """Optimizer steps a round."""
    batch_size: int = Field(default=16, ge=1)
    """Episodes a step."""
    learning_rate: float = Field(default=1e-3, ge=0)
    """Constant."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """0 is off."""


class DistillSettings(Settings):
    teacher: str = ""
    """An adapter: NAME, NAME@VERSION, NAME@LABEL or a folder. Empty: the base itself."""
    teacher_base: str = ""
    """Another base for the teacher, with the same tokenizer: a Hugging Face name or a folder. Empty: the student's."""
    teacher_prompt: str = ""
    """A system message that the teacher sees and the student does not."""
    on_policy: bool = True
    """true: the student samples, and the teacher judges every token. false: the teacher samples, and the student imitates it."""
    top_k: int = Field(default=1, ge=1)
    """Off-policy: the teacher's k likeliest tokens at every place as soft targets; 1: the token that it sampled."""
    data: str = ""
    """A jsonl file of questions; each line has "prompt" or "messages". Empty: those of the environment."""
    steps: int = Field(default=60, ge=0)
    """Optimizer steps."""
    groups_per_batch: int = Field(default=16, ge=1)
    """Problems or questions a step."""
    group_size: int = Field(default=4, ge=1)
    """Samples of each."""
    max_tokens: int = Field(default=72, ge=1)
    """Length limit of one turn."""
    learning_rate: float = Field(default=1e-3, ge=0)
    """Constant."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """0 is off."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the file's lines, chosen by their text, that is kept for evaluation."""

    @model_validator(mode="after")
    def _has_one_way(self) -> DistillSettings:
        if self.on_policy and self.top_k > 1:
            raise ValueError("top_k is for on_policy = false: on-policy the student's own tokens are the targets")
        return self


class EvalSettings(Settings):
    problems: int = Field(default=256, ge=1)
    """Held-out problems, one completion each."""
    every: int = Field(default=20, ge=1)
    """Steps between evaluations; there is one before and one after in any case."""


class ScorecardSettings(Settings):
    problems: int = Field(default=0, ge=0)
    """Held-out problems that the policy of the start and that of the end try many times each, behind the last step; 0: none.
    veneer scorecard does the same later."""
    tries: int = Field(default=128, ge=2)
    """At each problem by each policy; pass@k is told up to half of them."""
    envs: tuple[str, ...] = ()
    """Other environments, for what the run has taught and cost elsewhere."""
    elsewhere: int = Field(default=256, ge=2)
    """Held-out problems of each of those, one try each."""

    @model_validator(mode="after")
    def _has_enough(self) -> Self:
        if self.problems == 1:
            raise ValueError("one problem has no interval; give two or more, or 0 for no scorecard")
        return self


class RunConfig(Settings):
    kind: Literal["rl", "sft", "dpo", "rejection", "distill"] = "rl"
    """Which loop: rl, sft, dpo, rejection or distill; the section of that name holds its settings."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names the run's folder and the adapter."""
    folder: str = ""
    """Where the run is kept; empty: $VENEER_HOME/runs/NAME."""
    base: str = NANO
    """A Hugging Face name, a folder, or nano."""
    weights: Literal["lora", "full"] = "lora"
    """full trains a copy of all weights, for comparisons."""
    seed: int = 0
    """Fixes the adapter's start, the training problems and every draw. The held-out problems are the same for all seeds."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one. Float32 on a CPU, a bfloat16 base with float32 adapters on a GPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads: of each matrix product when sampling, passes side by side when training. nano gives the same bits at any number."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    init: str = ""
    """An adapter to start from: NAME, NAME@VERSION, NAME@LABEL or a folder. Empty: a fresh one, equal to the base."""
    lora: LoraSettings = LoraSettings()
    env: EnvSettings = EnvSettings()
    rl: RlSettings = RlSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    rejection: RejectionSettings = RejectionSettings()
    distill: DistillSettings = DistillSettings()
    eval: EvalSettings = EvalSettings()
    scorecard: ScorecardSettings = ScorecardSettings()

    def lora_config(self) -> LoraConfig | None:
        """What the engine is to create; None for full fine-tuning."""
        return None if self.weights == "full" else LoraConfig(**self.lora.model_dump(), seed=self.seed)

    @property
    def plays(self) -> bool:
        """Whether the loop plays the environment."""
        return self.kind in ("rl", "rejection") or (self.kind == "distill" and not self.distill.data)

    @property
    def max_tokens(self) -> int:
        """The limit of one turn of a loop that samples."""
        return getattr(self, self.kind).max_tokens

    @property
    def total_steps(self) -> int:
        loop = getattr(self, self.kind)
        return loop.rounds * loop.steps if self.kind == "rejection" else loop.steps

    def to_toml(self) -> str:
        """The resolved configuration, every key written out."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply ``a.b=value`` overrides; a value is TOML, or plain text if it is not.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    return make_config({"name": path.stem, **read_toml(path)}, overrides)


def read_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error


def make_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Check values and overrides.

    Raises:
        ConfigError: names the key, what is wrong, and the nearest key if it is unknown.
    """
    tree: dict[str, Any] = copy.deepcopy(dict(values))
    for override in overrides:
        override_in(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def override_in(tree: dict[str, Any], override: str) -> None:
    """Apply KEY=VALUE to nested tables; a number is a place in a list.

    Raises:
        ConfigError: it cannot be applied.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write KEY=VALUE, such as rl.steps=40")
    *sections, leaf = key.strip().split(".")
    node: Any = tree
    for section in sections:
        if isinstance(node, list):
            if not section.isdecimal() or int(section) >= len(node):
                raise ConfigError(f"--set {override}: there is no place {section!r}; there are 0 to {len(node) - 1}")
            node = node[int(section)]
        else:
            node = node.setdefault(section, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {section!r} is a value, not a section")
    if isinstance(node, list):
        raise ConfigError(f"--set {override}: name a key behind the place, such as stages.0.seed=1")
    node[leaf] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError) -> str:
    """The first complaint in one line."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{path} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    known = list(_keys(RunConfig))
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section
        near = [key for key in known if key.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    return f"unknown key {path!r}; did you mean {near[0]!r}?" if near else f"unknown key {path!r}; keys are {', '.join(known)}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += _keys(nested, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
