"""lm-evaluation-harness on a Megatron checkpoint: a model class for it.

    rank 0     lm_eval -> MegatronLM -> Engine.score, generate        the harness runs here only
    others     MegatronLM.lead        -> Engine.score, generate       they take part in each call

The harness would deal documents to data-parallel ranks itself, but then draws other few-shot
examples at another dp, and rank by rank its caches may disagree. Run once, it gives the same
figures at every tp and dp; the engine deals the requests.

Log-likelihoods follow the rules of the harness' own `hf` backend: what is too long is cut from the
left, an empty context becomes the BOS or end-of-text token, a text is scored in disjoint windows
that fill the positions, and special tokens are read out of the text. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from mlm_eval import __version__
from mlm_eval.checkpoints.errors import InputError, not_installed
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits
from mlm_eval.engine.batching import OnProgress
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.generate import generate
from mlm_eval.engine.prompts import GREEDY, Prompt, Sampling
from mlm_eval.engine.score import Request
from mlm_eval.harness.hub_encoding import HubEncoding
from mlm_eval.model.gpt import GPT
from mlm_eval.ranks.collectives import from_main
from mlm_eval.ranks.mesh import num_ranks

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        str(not_installed("lm_eval", "mlm_eval.harness.model")), name=error.name
    ) from error

CHUNK = 8192
"""Requests of one call; with --use_cache, an interrupted run keeps what the calls before gave."""

Window = tuple[tuple[int, ...], int]
"""Token ids, and how many of the last ones are scored."""

Bar = Callable[[], AbstractContextManager[OnProgress | None]]

GENERATION_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks", "seed")
WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
"""Options of transformers' generate that tasks set to what happens here anyway."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class MegatronLM(TemplateLM):
    """A Megatron checkpoint as a model of lm-evaluation-harness.

    On one process: `lm_eval.simple_evaluate(model=MegatronLM(engine, tokenizer), tasks=[...])`. On
    several, every rank builds one and calls `lead`, see there.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        seed: int | None = None,
        bar: Bar | None = None,
    ) -> None:
        """Wrap an engine; on several ranks, each of them makes this call.

        Args:
            engine: A loaded GPT model.
            tokenizer: The model's own.
            max_length: Tokens of a window; None: the model's positions.
            max_gen_toks: Tokens to generate where a task does not say.
            prefix_token_id: What stands before a text without context; None: BOS, or else the
                end-of-text token.
            add_bos_token: Whether BOS stands before every text; None: as the tokenizer's files say.
            seed: Of sampled texts; None: torch's, which the harness sets (`--seed`).
            bar: Makes a progress bar for each kind of requests.

        Raises:
            InputError: The model is not a GPT, the tokenizer does not belong to it, or an option is
                out of its range.
        """
        super().__init__()
        path = engine.checkpoint.provenance.path
        if not isinstance(engine.model, GPT):
            raise InputError(
                f"{path} is a {engine.config.family.upper()} checkpoint; lm-evaluation-harness "
                "needs a GPT model (left to right)"
            )
        positions = engine.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= positions:
            raise InputError(
                f"max_length {max_length} must be 1 to {positions}, {path}'s positions"
            )
        if max_gen_toks < 1:
            raise InputError(f"max_gen_toks {max_gen_toks} must be 1 or more")
        misfit = check_fits(tokenizer, engine.vocab_size, engine.config.family)
        if misfit is not None:
            log.warning("%s", misfit)
        self.engine = engine
        # Not `tokenizer`: the harness takes that attribute for a tokenizer of transformers.
        self._tokenizer = tokenizer
        self.encoding = HubEncoding(tokenizer, add_bos=add_bos_token)
        self.max_length = max_length or positions
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        choices = (prefix_token_id, self.encoding.bos_id, tokenizer.eot_id)
        self._prefix = next((token for token in choices if token is not None), None)
        self._bar: Bar = bar or nullcontext
        self._device = engine.device
        self._in_call = False

    # ---- one harness, many ranks ---------------------------------------------------------------

    def lead(self, body: Callable[[], T]) -> T | None:
        """Run `body`, which uses this model, on rank 0 and return its result; None on other ranks.

        Every rank makes this call. The others take part in the model's calls until `body` is done:

            results = lm.lead(lambda: lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"]))
        """
        if num_ranks() == 1:
            return body()
        if not self.engine.is_main:
            none_of_mine: Any = None
            while (asked := from_main(none_of_mine)) is not None:
                self._answer(asked)
            return None
        try:
            return body()
        finally:
            if not self._in_call:  # else the others have failed as this rank has
                from_main(None)

    def _in_chunks(self, items: Sequence[T]) -> Iterator[tuple[Sequence[T], list[Any]]]:
        """Yield windows or prompts with their answers, a chunk at a time, from all ranks."""
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            self._in_call = True  # of every rank; what rank 0 asks for counts
            answers = self._answer(from_main(chunk))
            self._in_call = False
            yield chunk, answers

    def _answer(self, items: Sequence[Any]) -> list[Any]:
        """Score windows or continue prompts; runs on every rank."""
        return self._write(items) if isinstance(items[0], Prompt) else self._score(items)

    # ---- text and tokens -----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token."""
        return self._tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        if self._prefix is None:
            raise InputError(
                f"{self._tokenizer.source} has no BOS or end-of-text token to stand before a text "
                "without context; give one with --model_args prefix_token_id=N"
            )
        return self._prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; `add_special_tokens` False: without BOS."""
        if add_special_tokens is None:
            written = "" if self._prefix is None else self._tokenizer.decode([self._prefix])
            add_special_tokens = not (written and string.startswith(written))
        return self.encoding.encode(string, special=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps prepared prompts under."""
        return self._tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return no template: a Megatron checkpoint has none."""
        if chat_template:
            raise InputError(
                f"{self.engine.checkpoint.provenance.path} has no chat template; leave out "
                "--apply_chat_template"
            )
        return None

    # ---- log-likelihoods -----------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        windows: list[Window] = []
        askers: dict[Window, list[tuple[str, str]]] = {}
        longer = 0
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, 1 to {self.max_length} can be "
                    f"scored: {str(texts and texts[1])[:60]!r}"
                )
            longer += len(context) + len(continuation) > self.max_length + 1
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            windows.append((tokens, len(continuation)))
            if texts is not None:
                askers.setdefault(windows[-1], []).append(texts)
        if longer:
            log.warning(
                "%d of %d requests are longer than %d tokens and were cut from the left",
                longer,
                len(requests),
                self.max_length + 1,
            )
        answers: dict[Window, tuple[float, bool]] = {}
        # Each distinct window once, the longest first, equal inputs side by side.
        distinct = sorted(dict.fromkeys(windows), key=lambda window: (-len(window[0]), window))
        for chunk, found in self._in_chunks(distinct):
            answers.update(zip(chunk, found, strict=True))
            for window in chunk:
                for texts in askers.get(window, ()):
                    self.cache_hook.add_partial("loglikelihood", texts, answers[window])
        return [answers[window] for window in windows]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each by itself, in disjoint windows."""
        parts: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(parts)
            parts += [(None, *make_disjoint_window(window)) for window in windows]
            counts.append(len(parts) - before)
        answers = iter(self._loglikelihood_tokens(parts))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            total = sum(next(answers)[0] for _ in range(count))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(float(total))
        return totals

    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """Score windows; runs on every rank."""
        requests = [Request(torch.tensor(tokens), scored) for tokens, scored in windows]
        with self._bar() as on_progress:
            scores = self.engine.score(requests, on_progress=on_progress)
        sums = (-scores.nll_sums()).tolist()
        return list(zip(sums, scores.all_greedy().tolist(), strict=True))

    # ---- texts ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first of its stop strings."""
        repeats: Counter[int] = Counter()  # the same request again asks for another sample
        prompts = []
        for request in requests:
            prompts.append(self._prompt(request, repeats[id(request)]))
            repeats[id(request)] += 1
        askers: dict[Prompt, list[Instance]] = {}
        for prompt, request in zip(prompts, requests, strict=True):
            askers.setdefault(prompt, []).append(request)
        answers: dict[Prompt, str] = {}
        for chunk, found in self._in_chunks(list(askers)):
            for prompt, tokens in zip(chunk, found, strict=True):
                text = self.encoding.decode(tokens)
                answers[prompt] = postprocess_generated_text(text, list(prompt.stop), None)
                for request in askers[prompt]:
                    self.cache_hook.add_partial("generate_until", request.args, answers[prompt])
        return [answers[prompt] for prompt in prompts]

    def _prompt(self, request: Instance, repeat: int) -> Prompt:
        """Return what to generate for a request.

        Raises:
            InputError: The task asks for what is not there.
        """
        context, options = request.args
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        for name, value in options.items():
            if name not in GENERATION_OPTIONS and WITHOUT_EFFECT.get(name) != value:
                raise InputError(
                    f"task {request.task_name} generates with {name}={value!r}, which is not "
                    f"supported; known are {', '.join(GENERATION_OPTIONS)}"
                )
        length = options["max_gen_toks"]
        if not 1 <= length < self.max_length:
            raise InputError(
                f"task {request.task_name} generates {length} tokens, which leaves no room for its "
                f"context in {self.max_length} positions; set --gen_kwargs max_gen_toks=N"
            )
        tokens = self.tok_encode(context)[-(self.max_length - length) :] or [self.prefix_token_id]
        end = self.eot_token_id
        stop = handle_stop_sequences(
            list(options["until"]),
            eos=None if end is None else self._tokenizer.decode([end]),
        )
        sampling = _sampling(options, request.task_name)
        greedy = sampling == GREEDY
        return Prompt(
            tokens=tuple(tokens),
            max_new_tokens=length,
            stop_tokens=frozenset(() if end is None else (end,)),
            stop=tuple(string for string in stop if string),
            sampling=sampling,
            seed=0 if greedy else self._seed(request, options.get("seed"), repeat),
        )

    def _seed(self, request: Instance, asked: int | None, repeat: int) -> int:
        """Return the seed of one sample: of its document, wherever and with whatever it is run."""
        base = next(s for s in (asked, self.seed, torch.initial_seed()) if s is not None)
        key = [base, request.task_name, request.doc_id, request.idx, request.args[0], repeat]
        return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:7], "big")

    def _write(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Generate; runs on every rank."""
        with self._bar() as on_progress:
            texts = generate(
                self.engine, prompts, tokenizer=self._tokenizer, on_progress=on_progress
            )
        return [text.tokens for text in texts]

    # ---- the record ----------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness puts into its results file about the model."""
        provenance = self.engine.checkpoint.provenance
        return {
            "model_num_parameters": self.engine.checkpoint.num_parameters,
            "model_dtype": str(self.engine.dtype),
            "mlm_eval": {
                "version": __version__,
                "path": str(provenance.path),
                "format": provenance.format,
                "digest": provenance.digest,
                **self.engine.describe(),
                "tokenizer": self._tokenizer.record(),
                **self.encoding.begin(),
                "max_length": self.max_length,
                "warnings": list(provenance.warnings),
            },
        }

    def summary(self) -> str:
        """Return in one line what the figures rest on."""
        engine, found = self.engine, self.engine.checkpoint.provenance
        return (
            f"{found.path} (digest {found.digest.rpartition(':')[2][:12]}), "
            f"{str(engine.dtype).removeprefix('torch.')}, tp {engine.tp} x dp {engine.dp}, "
            f"vocab {engine.vocab} ({engine.vocab_size:,} rows), windows of {self.max_length:,} "
            f"tokens, tokenizer {self._tokenizer.source}, version {__version__}"
        )


def _sampling(options: Mapping[str, Any], task: str | None) -> Sampling:
    if not options["do_sample"]:
        return GREEDY
    temperature = float(options.get("temperature", 1.0))
    if temperature == 0.0:
        raise InputError(
            f"task {task} samples (do_sample) at temperature 0; leave do_sample out for the most "
            "likely text, or give a temperature above 0"
        )
    top_k, top_p = options.get("top_k"), options.get("top_p")
    # As in transformers, 0 switches top_k off.
    return Sampling(temperature, top_k or None, None if top_p is None else float(top_p))
