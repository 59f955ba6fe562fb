"""A backend as lm-eval's ``LM``: what EleutherAI's lm-evaluation-harness asks, batched our way."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row

# What lm-eval's own normalisation leaves beside the two settings below; all mean greedy search.
GREEDY = {"do_sample": (False,), "temperature": (0, None), "num_beams": (1,)}
ONLY_WHEN_SAMPLING = {"top_p", "top_k", "min_p"}
DEFAULT_NEW_TOKENS = 256  # lm-eval's own


class BackendLM(TemplateLM):
    """Tokenises, truncates and windows as lm-eval's ``hf`` model does.

    To lm-eval every rank is the only one: all ranks ask the backend the same, and it deals the
    work out.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.model = backend
        self.tokenizer = backend.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        return [(score.log_probability, score.is_greedy) for score in self.model.score(rows)]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Cut from the left to what the model has room for; the last token is no input.

        Raises:
            ValueError: no room for any context.
        """
        room = self.model.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens: max_length is "
                f"{self.model.max_length}; raise --max-length, or leave the task out."
            )
        return Row.continuation(context[-room:], continuation)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """A text's log-likelihood, each token given those before it in its window; decisions see
        windows as ``Backend.windows`` says."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.max_length,
                context_len=1,
            )
            for window in windows:
                rows.append(self._row(*make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.model.score(self.model.windows(rows)), strict=True):
            totals[owner] += score.log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations. Requests that end alike run together.

        Raises:
            ValueError: other settings than greedy search, or more new tokens than fit.
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._ending(request.args[1])].append(index)
        texts = [""] * len(requests)
        for (until, new), indices in groups.items():
            room = self.model.max_length - new
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in indices]
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
            found = self.model.generate(prompts, until=until, max_new_tokens=new)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
        return texts

    def _ending(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """The stop strings and the most new tokens of a request's ``generation_kwargs``."""
        settings = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        until, new = settings.pop("until"), settings.pop("max_gen_toks")
        for name, value in settings.items():
            if name not in ONLY_WHEN_SAMPLING and value not in GREEDY.get(name, ()):
                raise ValueError(
                    f"generation_kwargs.{name} = {value!r}: generation is greedy here; change the "
                    "task, or run it with lm-eval's 'hf' model on the export."
                )
        if not 0 < new < self.model.max_length:
            raise ValueError(
                f"generation_kwargs.max_gen_toks = {new}: must be from 1 to "
                f"{self.model.max_length - 1}, so that some prompt fits the max_length of "
                f"{self.model.max_length}."
            )
        return tuple(stop for stop in until if stop), new
