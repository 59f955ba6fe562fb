"""Long prompts of real text, for timing."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mod.data.python_docs import topic_text


def long_prompts(tokenizer, *, length: int, count: int) -> list[Tensor]:
    """Chat prompts of ``length`` tokens about different parts of the language reference."""
    words = topic_text().split(" ")
    prompts = []
    for index in range(count):
        start = index * len(words) // count
        page = " ".join(words[start : start + 2 * length])
        message = {"role": "user", "content": f"Summarise this page.\n\n{page}"}
        if tokenizer.chat_template:
            page = tokenizer.apply_chat_template([message], tokenize=False)
        ids = tokenizer(page, add_special_tokens=False)["input_ids"]
        prompts.append(torch.tensor([ids[:length]]))
    return prompts
