"""Tiny random models of real architectures."""

from __future__ import annotations

import torch
import transformers as hf

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "gemma": lambda: hf.GemmaConfig(**SMALL, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=16, final_logit_softcapping=5.0),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=16),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, attn_implementation="eager"),
    "phi": lambda: hf.PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
}
"""Two-layer models; gemma2 caps its logits and slides its attention, so it takes the engine's long ways round."""
ARCHITECTURES = tuple(CONFIGS)


def random_model(architecture: str, seed: int = 0) -> hf.PreTrainedModel:
    """A model whose weights are large enough for its logits to differ between tokens."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model
