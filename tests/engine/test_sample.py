import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moestro.core.errors import InputError
from moestro.engine.sample import Sampler, SamplingParams, limit, penalise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.5, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_p": 1e-6},
    ],
)
def test_same_scores_as_transformers(options, seed):
    params = SamplingParams(**options)
    logits = np.random.default_rng(seed).normal(0, 3, 200).astype(np.float32)
    prompt = [3, 7, 7, 199]
    ids, scores = torch.tensor([prompt]), torch.from_numpy(logits.copy())[None]
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    ours = penalise(logits, prompt, params.repetition_penalty)
    np.testing.assert_array_equal(ours, scores[0].numpy())
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    ours = limit(ours, params)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(scores[0].numpy()))
    np.testing.assert_allclose(ours, scores[0].numpy(), rtol=1e-6)


def test_greedy_takes_the_lowest_of_equals():
    assert Sampler(SamplingParams(), [])(np.array([0, 2, 2, 1], np.float32)) == 1


def test_repetition_penalty_counts_generated_tokens():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    logits = np.array([4.0, 3.0, 2.5], np.float32)
    assert [sampler(logits) for _ in range(2)] == [1, 2]


def test_draws_follow_the_probabilities_and_the_seed():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    first, again, other = (Sampler(SamplingParams(temperature=1.0, seed=seed), []) for seed in (5, 5, 6))
    draws = [first(logits) for _ in range(4000)]
    assert draws == [again(logits) for _ in range(4000)]
    assert draws != [other(logits) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 4000, [0.5, 0.3, 0.2], atol=0.03)


def test_excluded_tokens_are_never_drawn():
    sampler = Sampler(SamplingParams(temperature=5.0, top_k=2), [])
    assert {sampler(np.array([1, 3, 2, 0], np.float32)) for _ in range(200)} == {1, 2}


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"stop": ("",)},
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)
