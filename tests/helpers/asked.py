"""What lm-eval asks of a model, and what lm-eval's own ``hf`` model answers."""

from __future__ import annotations

from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tests.helpers import formula, tiny

POSITIONS = 96  # of the model; a byte is a token
PAIRS = [
    ("What is two and two?", " four"),
    ("The capital of France is", " Paris"),
    ("", "yes"),  # an empty context
    ("x y" * 40, " no"),  # a context longer than the model
    ("A long story about ", "a dog"),  # lm-eval moves the space
    ("Q", "A" * (POSITIONS - 2)),
]
TEXTS = [("What is two and two?",), ("x y" * 60,), ("a",), ("",)]
PROMPTS = [context for context, _ in PAIRS if context]
NEW = 12


def save_model(folder: Path) -> Path:
    """A tiny dense Llama with a byte-level tokenizer."""
    hf = tiny.save_llama(
        folder, vocab_size=tiny.VOCAB, max_position_embeddings=POSITIONS, num_key_value_heads=2
    )
    return tiny.save_tokenizer(hf)


def mixed_routers(hf: Path, tokenizer, scheme: str) -> formula.Routers:
    """Routers of which each keeps some of the texts and skips some."""
    texts = [tokenizer.encode(text)[-POSITIONS:] for text in PROMPTS]
    generator = torch.Generator().manual_seed(1)
    dense = formula.load_dense(hf)
    return formula.mixed_routers(dense, texts, (1, 2, 3), generator, **formula.SCHEMES[scheme])


def ask(lm: LM, *, until: tuple[str, ...] = ()) -> dict[str, list]:
    """A model's answers to all three kinds of request."""
    settings = {"until": list(until), "max_gen_toks": NEW, "do_sample": False}
    asked = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": TEXTS,
        "generate_until": [(prompt, settings) for prompt in PROMPTS],
    }
    return {
        kind: getattr(lm, kind)([Instance(kind, {}, one, i) for i, one in enumerate(requests)])
        for kind, requests in asked.items()
    }


def lm_eval_hf(folder: Path) -> LM:
    """lm-eval's ordinary model of a folder, at batch size 1."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder),
        trust_remote_code=True,
        dtype="float32",
        device="cpu",
        batch_size=1,
        max_length=POSITIONS,
    )


def prompt_pooled(hf: Path, tokenizer, routers: dict, scheme: str) -> list[float]:
    """The log-likelihoods of ``PAIRS`` by the formula when a decision sees the context only."""
    dense, scheme = formula.load_dense(hf), formula.SCHEMES[scheme]
    found = []
    for context, continuation in PAIRS:
        moved = len(context) - len(context.rstrip())
        context, continuation = context.rstrip(), " " * moved + continuation
        answer = tokenizer.encode(continuation)
        prompt = tokenizer.encode(context) or [tokenizer.bos_token_id]
        prompt = prompt[-(POSITIONS + 1 - len(answer)) :]
        ids = prompt + answer[:-1]
        with torch.no_grad():
            _, made, _ = formula.forward(dense, prompt, routers, **scheme)
            masks = {layer: mask[:1].expand(len(ids)) for layer, mask in made.items()}
            logits, _, _ = formula.forward(dense, ids, routers, masks=masks, **scheme)
        chosen = logits[-len(answer) :].log_softmax(-1)
        found.append(float(chosen.gather(1, torch.tensor(answer)[:, None]).sum()))
    return found


def largest_difference(found: list, expected: list) -> float:
    """Of log-likelihoods, relative to their size; infinite where a greedy flag differs."""
    differences = []
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, tuple):
            if ours[1] != theirs[1]:
                return float("inf")
            ours, theirs = ours[0], theirs[0]
        differences.append(abs(ours - theirs) / max(abs(theirs), 1.0))
    return max(differences)
