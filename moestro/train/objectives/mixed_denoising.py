"""Mixed denoising: half prefixes to continue, half holes to fill, for a decoder.

Paper      Tay et al. 2022, UL2, arXiv 2205.05131; under a causal mask: Xue et al. 2024, OpenMoE, arXiv 2402.01739
Idea       A decoder that must also fill holes of several sizes learns more from the same text; afterwards it is trained on plain text.
Rule       each sequence draws a task. prefix (share 0.5): a random part is given, the loss is on the rest. spans (0.1 each: mean length 3 or 8 of
           15 %, 3, 8 or 64 of 50 %): text with each span replaced by a mark, then mark and span for each of them; the loss is on the
           second part. From step `until` on: next token
Needs      `marks` ids at the end of the vocabulary that the text has not: model.vocabulary = the tokenizer's + marks
Gives      the loss per token that carries it, its parts as metrics, and the share of such tokens
Departs    no token names the task. Text that does not fit with its marks is cut at the end; what is left over is filled with the last mark, without
           loss
Checked    the text comes back from what is given and asked; shares of tasks, of masked text and mean lengths of spans; from `until` on: next token
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.site import require
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, run

TASKS = ((0.0, 0), (0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.5, 64))  # share that is masked, mean length; the first: prefix
SHARES = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)


@method("train.objectives.mixed_denoising", kind="objective", fidelity="adapted", paper="2402.01739")
class MixedDenoising:
    """marks: how many ids mark spans. until: step from which on the next token is predicted, 0 never."""

    def __init__(self, *, marks: int = 100, until: int = 0) -> None:
        require(marks >= 1 and until >= 0, f"marks {marks}, until {until}", "at least 1 and 0")
        self.marks, self.until = marks, until

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        asked_BT = torch.ones_like(batch.targets_BT, dtype=torch.bool)
        if not self.until or step < self.until:
            first: int = module.config.vocabulary - self.marks  # type: ignore[assignment,union-attr,operator]
            self._check(batch, first)
            require(batch.document_BT is None, "data.mask_documents", "false: spans move across documents")
            text = torch.cat((batch.tokens_BT, batch.targets_BT[:, -1:]), 1)
            rows, asked = zip(*(self.row(line, first, rng) for line in text), strict=True)
            full, asked_BT = torch.stack(rows), torch.stack(asked)[:, 1:]
            batch = Batch(full[:, :-1], full[:, 1:], batch.domain_B)
        output = run(module, batch, step, rng)
        losses = functional.cross_entropy(output.logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten(), reduction="none")
        task = (losses * asked_BT.flatten()).sum() / asked_BT.sum().clamp_min(1)
        loss = task + sum(output.losses.values(), task.new_zeros(()))
        return Outcome(loss, {"task": task, **output.losses, "asked": asked_BT.float().mean()}, (output,))

    def row(self, text_S: Tensor, first: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """One sequence as it is given, and which of its tokens are asked for; both as long as the text."""
        kind = int(torch.multinomial(torch.tensor(SHARES), 1, generator=rng))
        share, mean = TASKS[kind]
        size = len(text_S)
        if not share:
            start = 1 + int(torch.randint(size - 1, (1,), generator=rng)) if size > 1 else 0
            return text_S, torch.arange(size) >= start
        used, masked, count = sizes(size, share, mean)
        require(
            count <= self.marks, f"{count} spans in a sequence of {size} tokens", f"at most {self.marks} marks", "raise marks"
        )
        holes = split(masked, count, rng)
        between = split(used - masked, count, rng)
        given, asked, at = [], [], 0
        for i in range(count):
            mark = text_S.new_tensor([first + i])
            given += [text_S[at : at + between[i]], mark]
            at += between[i]
            asked += [mark, text_S[at : at + holes[i]]]
            at += holes[i]
        known = used - masked + count
        found = torch.cat([*given, *asked])
        row = functional.pad(found, (0, size - len(found)), value=first + self.marks - 1)
        place = torch.arange(size)
        return row, (place >= known) & (place < len(found))

    def _check(self, batch: Batch, first: int) -> None:
        largest = max(int(batch.tokens_BT.max()), int(batch.targets_BT.max()))
        if largest >= first:
            raise InputError(
                f"the text has the id {largest}, and the marks begin at {first}",
                expected="ids for marks that the text has not",
                fix=f"model.vocabulary = the tokenizer's + {self.marks}",
            )


def sizes(size: int, share: float, mean: int) -> tuple[int, int, int]:
    """(tokens of text used, masked ones, spans), so that text and two marks for each span fit into `size`. Needs 4 or more."""
    require(size >= 4, f"sequences of {size - 1} tokens", "at least 3")
    for used in range(size, 1, -1):
        masked = min(max(1, round(used * share)), used - 1)
        count = min(max(1, round(masked / mean)), masked, used - masked)
        if used + 2 * count <= size:
            return used, masked, count
    raise AssertionError("two tokens and two marks fit into four places")


def split(total: int, parts: int, rng: torch.Generator) -> list[int]:
    """`total` in `parts` random lengths of at least 1."""
    cuts = torch.randperm(total - 1, generator=rng)[: parts - 1].sort().values + 1
    edges = [0, *cuts.tolist(), total]
    return [b - a for a, b in pairwise(edges)]
