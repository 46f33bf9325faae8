"""Bits per character: how well the model compresses the text.

Paper      Huang et al. 2024, arXiv 2404.09937
Idea       Compression of fresh text is nearly linear in benchmark scores, and needs no questions and answers.
Rule       sum of -log2 p(token | context) / characters, per label and over all text; the paper's context is 1900 tokens of which 512 are new
Needs      loss
Gives      per label bits per character, nats per token, perplexity, and the share of tokens that were predicted
Departs    nothing with --length 1900 --stride 512; other cuts are reported as they are. Characters are Unicode code points
Checked    a uniform model over 256 bytes gives 8 bits on ASCII; the same whatever the order of sequences
"""

from __future__ import annotations

import math

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.bits_per_character", kind="measure", paper="2404.09937", fidelity="faithful", needs=("loss",))
def bits_per_character(profile: Profile) -> Finding:
    """One row per label and one for all."""
    nats_G, predicted_G = profile.need("loss", "nats_G"), profile.need("loss", "predicted_G")
    if profile.characters_G is None or not sum(profile.characters_G):
        raise InputError(
            "the characters of the text are not known",
            expected="a finished profile of text",
            fix="profile text instead of token ids",
        )
    characters_G, tokens_G = np.array(profile.characters_G), np.array(profile.tokens_G)
    groups = [*((name, np.array([g])) for g, name in enumerate(profile.labels)), ("all", np.arange(len(profile.labels)))]
    rows = []
    for name, g in groups if len(profile.labels) > 1 else groups[-1:]:
        nats, predicted, characters = float(nats_G[g].sum()), int(predicted_G[g].sum()), int(characters_G[g].sum())
        if not predicted or not characters:
            rows.append((name, None, None, None, 0.0))
            continue
        mean = nats / predicted
        rows.append(
            (name, nats / math.log(2) / characters, mean, math.exp(min(mean, 700)), predicted / max(1, int(tokens_G[g].sum())))
        )
    return finding(
        ("label", "bits_per_character", "nats_per_token", "perplexity", "predicted"),
        rows,
        "predicted: the first token of a sequence is not, so bits are a little low where sequences are short; a --stride below --length"
        " leaves only the first token of each document out.",
        "Compare models on the same text and the same cut only; a model that was trained on the text compresses it too well.",
    )
