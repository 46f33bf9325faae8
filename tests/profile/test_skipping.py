"""PPL-p% sparsity: a threshold of 0 changes nothing, the search keeps its bound, and the model is as it was."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.measures.activation_sparsity import activation_sparsity, thresholds
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.skipping import Skipping, ppl_sparsity, search
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny


@pytest.fixture(scope="module", params=["olmoe", "llama4_text", "gpt_oss"])
def running(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    save_tiny(request.param, folder)
    model = open_model(folder)
    return model, cut([Document("a", "s", tokens=continued(model, [start])) for start in (5, 50, 77)], None)


def continued(model, tokens: list[int]) -> list[int]:
    """Text that this model predicts, so that skipping neurons makes it worse."""
    for _ in range(20):
        (output,) = model.run([tokens])
        tokens = [*tokens, int(output.logits_TV[-1].argmax())]
    return tokens


def sparsity(model, texts):
    recording = Recording(model, texts, make({"sparsity": {}}))
    recording.run(model)
    return recording.profile()


def test_a_threshold_of_zero_changes_nothing(running):
    model, _ = running
    (output,) = model.run([list(range(5, 20))], inputs=True)
    for record in output.records:
        experts = Skipping(model.layers[record.ordinal].experts, 0.0)
        assert torch.allclose(experts.run(record.x_TD, record.routing), record.y_TD, atol=1e-5, rtol=1e-4)
        assert experts.kept == experts.neurons > 0


def test_the_search_stays_within_its_bound(running):
    model, texts = running
    made = sparsity(model, texts)
    before = next(iter(model.run([[5, 6, 7]]))).logits_TV
    found = {p: ppl_sparsity(model, texts, made, p) for p in (0.5, 5.0)}
    for percent, row in found.items():
        assert row["rise"] <= percent + 1e-6 and 0 < row["ratio"] <= 1
    assert found[5.0]["ratio"] <= found[0.5]["ratio"] < 1, "more error, fewer neurons"
    assert torch.equal(next(iter(model.run([[5, 6, 7]]))).logits_TV, before)
    made.info["ppl_sparsity"] = found[5.0]
    last = activation_sparsity(made).rows[-1]
    assert last[0].startswith("PPL-5%") and last[1] == found[5.0]["ratio"]
    assert (thresholds(made, found[5.0]["kappa"]) >= thresholds(made, found[0.5]["kappa"])).all()
    with pytest.raises(InputError, match="may rise by 0"):
        ppl_sparsity(model, texts, made, 0.0)


def test_bisection():
    assert search(lambda k: k * k, 0.25) == pytest.approx(0.5, abs=2**-11) and search(lambda k: k * k, 0.25) <= 0.5
    assert search(lambda k: 1.0, 0.5) == 0 and search(lambda k: 0.1, 0.5) == 1
