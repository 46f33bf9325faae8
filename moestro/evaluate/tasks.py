"""A runner as lm-eval sees a model: likelihoods of continuations and of whole texts, and greedy answers. Needs lm-eval.

Texts are cut into context and continuation, begun and truncated as lm-eval 0.4.13's own `HFLM` does it, so that scores are the same.
Requests are read in an order in which each begins as the one before did as far as possible, and that part is read once: the context of
a question's choices, and examples that come before every question. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moestro.core.errors import InputError
from moestro.core.layer import ModelFacts, Reading
from moestro.evaluate.perplexity import log_softmax
from moestro.models.tokenizer import Tokenizer

MOST_ANSWER_TOKENS = 256  # of tasks that do not say, as everywhere in lm-eval
_ROWS = 64  # tokens whose predictions are held at once
_GREEDY = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
}  # the last ones change no greedy answer
_HERE = "THE-MESSAGE-GOES-ON-HERE "

Asked = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, for lm-eval's cache; context; continuation


class Scored(Protocol):
    """What is needed of a runner: `core.layer.Runner` and `ReadingAccess` together."""

    @property
    def facts(self) -> ModelFacts: ...

    def reading(self, capacity: int) -> Reading: ...


class TaskModel(TemplateLM):
    """lm-eval's view of a runner. Answers are greedy; a request for anything else raises InputError.

    max_length: tokens that the model may see at once, by default its context. cut: requests so far that lost their beginning to it.
    """

    def __init__(self, runner: Scored, tokenizer: Tokenizer, *, max_length: int | None = None) -> None:
        super().__init__()
        self.runner, self.text = runner, tokenizer
        self.max_length = min(max_length or runner.facts.context, runner.facts.context)
        self.cut = 0
        named = {role: tokenizer.token_id(tokenizer.special.get(role, "")) for role in ("eos_token", "bos_token")}
        end = named["eos_token"] if named["eos_token"] is not None else next(iter(tokenizer.eos_ids), named["bos_token"])
        if end is None:
            raise InputError(
                f"the tokenizer of {tokenizer.folder} has neither a first nor a last token",
                expected="one of them, to begin a text with",
                fix="name its eos_token in tokenizer_config.json",
            )
        self._end: int = end
        self._start: int = end if named["bos_token"] is None else named["bos_token"]

    # Texts and tokens

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts around a text, unless it is written there already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.text.decode([self._start], skip_special=False))
        return self.text.encode(string, add_special=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return str(self.text.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for lm-eval's records."""
        name = chat_template if isinstance(chat_template, str) else "default"
        return self.text.templates.get(name) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a text; without `add_generation_prompt` it stops where the last message does, for the model to go on with it."""
        if add_generation_prompt:
            return self.text.render_chat(chat_history)
        *before, last = chat_history
        said = self.text.render_chat([*before, {**last, "content": last["content"] + _HERE}], False)
        at = said.rindex(_HERE.strip())
        return said[:at] if said.startswith(_HERE, at) else said[:at].rstrip()  # some templates strip what they are given

    # Likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Asked], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether every token was the likeliest) of each continuation."""
        if not requests:
            return []
        inputs = [self._input(context, continuation) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        shared = _Shared(self.runner.reading(max(map(len, inputs))))
        order = sorted(range(len(inputs)), key=lambda i: inputs[i])
        for i in tqdm(order, desc="Reading choices and texts", disable=disable_tqdm):
            texts, _, continuation = requests[i]
            found[i] = _likelihood(shared.logits(inputs[i], len(continuation)), continuation)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return [found[i] for i in range(len(inputs))]

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        """All but the last token, as many as fit."""
        if not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a task asks for the likelihood of {len(continuation)} tokens",
                expected=f"1 to {self.max_length}, the context of the model",
            )
        self.cut += len(context) + len(continuation) > self.max_length + 1
        return [*context, *continuation][-(self.max_length + 1) :][:-1]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts; those longer than the context are read in windows that predict each token once."""
        windows: list[Asked] = []
        counts: list[int] = []
        for request in requests:
            rolled = get_rolling_token_windows(self.tok_encode(request.args[0]), self._start, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in rolled]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        cut = self.cut
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        self.cut = cut
        out = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return out

    # Answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to one of its stop texts, an end token or its number of tokens."""
        if not requests:
            return []
        asked = [self._asked(*request.args) for request in requests]
        shared = _Shared(self.runner.reading(max(len(prompt) + most for prompt, _, most in asked)))
        found: dict[int, str] = {}
        order = sorted(range(len(asked)), key=lambda i: asked[i][0])
        for i in tqdm(order, desc="Answering", disable=disable_tqdm):
            found[i] = self._answer(shared, *asked[i])
            self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return [found[i] for i in range(len(asked))]

    def _asked(self, text: str, settings: Mapping[str, Any]) -> tuple[list[int], list[str], int]:
        """The prompt's tokens as many as fit, stop texts, and how many tokens may be written."""
        check_greedy(settings, "a task")
        most = answer_tokens(settings)
        if not 0 < most < self.max_length:
            raise InputError(
                f"a task asks for answers of {most} tokens",
                expected=f"1 to {self.max_length - 1}, less than the context of the model",
            )
        stops = handle_stop_sequences(_normal(settings)["until"], self.text.decode([self._end], skip_special=False))
        prompt = self.tok_encode(text) or [self._start]
        self.cut += len(prompt) > self.max_length - most
        return prompt[-(self.max_length - most) :], [stop for stop in stops if stop], most

    def _answer(self, shared: _Shared, prompt: list[int], stops: list[str], most: int) -> str:
        ends = {self._end, *self.text.eos_ids}
        written: list[int] = []
        (logits_TV,) = shared.logits(prompt, 1)
        while (token := int(logits_TV[-1].argmax())) not in ends:
            written.append(token)
            said = self.text.decode(written, skip_special=False)
            if len(written) == most or any(stop in said for stop in stops):
                break
            logits_TV = shared.more(token)
        return postprocess_generated_text(self.text.decode(written), stops, None)


def check_greedy(settings: Mapping[str, Any], who: str) -> None:
    """Raises InputError when generation settings ask for more than greedy answers. who: asks."""
    normal = _normal(settings)
    asked = {name: value for name, value in normal.items() if name not in _GREEDY and (name, value) != ("num_beams", 1)}
    if normal["do_sample"] and normal.get("temperature", 0) > 0:
        asked["temperature"] = normal["temperature"]
    if asked:
        name, value = next(iter(asked.items()))
        raise InputError(
            f"{who} asks for answers with {name} {value}",
            expected="greedy answers, which are the same for everybody",
            fix="choose another task, or write it anew with do_sample: false",
        )


def answer_tokens(settings: Mapping[str, Any]) -> int:
    """Tokens that an answer may have."""
    return int(_normal(settings)["max_gen_toks"])


def _normal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which each setting has one name."""
    return dict(normalize_gen_kwargs(dict(settings), MOST_ANSWER_TOKENS))


class _Shared:
    """Reads sequences one after another; the beginning that one shares with the last is not read again."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._held: list[int] = []

    def logits(self, tokens: list[int], count: int) -> Iterator[np.ndarray]:
        """logits_TV after each of the last `count` tokens, in pieces."""
        pairs = zip(self._held, tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(tokens)))
        asked = len(tokens) - count
        start = min(same, asked)
        self._reading.back(start)
        self._held = tokens[:start]
        if start < asked:
            self._reading.read(tokens[start:asked])
        for at in range(asked, len(tokens), _ROWS):
            yield self._reading.read(tokens[at : at + _ROWS], every=True)
        self._held = list(tokens)

    def more(self, token: int) -> np.ndarray:
        self._held.append(token)
        return self._reading.read([token])


def _likelihood(logits: Iterator[np.ndarray], continuation: list[int]) -> tuple[float, bool]:
    total, greedy, at = 0.0, True, 0
    for logits_TV in logits:
        wanted_T = continuation[at : at + len(logits_TV)]
        total += float(log_softmax(logits_TV)[np.arange(len(wanted_T)), wanted_T].sum())
        greedy = greedy and logits_TV.argmax(-1).tolist() == wanted_T
        at += len(logits_TV)
    if math.isnan(total):
        raise InputError("the model's predictions are not numbers", fix="check the model's weights")
    return total, greedy
