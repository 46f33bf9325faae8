"""Bits chosen within a bound: the searches on known losses, and whole plans on tiny models."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.core.errors import BudgetError, InputError
from moestro.core.plans.residency import Measured, ResidencyPlan
from moestro.engine import trial
from moestro.engine.engine import Engine
from moestro.engine.pack import apply, pack
from moestro.engine.precision.d2moe import d2moe, removals
from moestro.engine.precision.edgemoe import edgemoe
from moestro.engine.precision.search import Evidence, furthest
from moestro.engine.quality import Bound, parts, plan_quality
from moestro.engine.store import PackedStore
from moestro.engine.trial import Trials
from moestro.evaluate.perplexity import measure
from moestro.models.codecs.encode import parse_codec

WIDE = {"hidden_size": 64, "intermediate_size": 64}
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 128, 512)]
GIVEN = {"runtime_bytes": 1 << 20, "disk_rate": 1e9, "memory_rate": 1e10}


def evidence(layers=3, experts=5, widths=3, seed=0) -> Evidence:
    rng = np.random.default_rng(seed)
    harm_LEW = np.sort(rng.random((layers, experts, widths)), axis=2)[:, :, ::-1]
    return Evidence(
        rng.integers(1, 50, (layers, experts)), harm_LEW, np.broadcast_to(np.arange(1, widths + 1) * 100, harm_LEW.shape)
    )


def total(found: Evidence, widths_LE: np.ndarray) -> float:
    """A model whose loss is the sum of its experts' harms."""
    return float(np.take_along_axis(found.harm_LEW, widths_LE[:, :, None], 2).sum())


def test_the_furthest_step_within_a_bound():
    for last in range(12):
        for limit in range(last + 1):
            asked: list[int] = []

            def within(step: int, limit=limit, asked=asked) -> bool:
                asked.append(step)
                return step <= limit

            assert furthest(within, last) == limit
            assert len(asked) <= (last + 1).bit_length() and 0 not in asked


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_edgemoe_takes_as_many_of_the_least_important_as_the_bound_allows(seed, share):
    found = evidence(seed=seed)
    levels = [total(found, np.full((3, 5), w)) for w in range(3)]
    bound = levels[2] + share * (levels[0] - levels[2])
    widths_LE = edgemoe(found, lambda w: total(found, w) <= bound)
    assert total(found, widths_LE) <= bound
    high = min(w for w in range(3) if levels[w] <= bound)
    assert set(np.unique(widths_LE)) <= {high, max(0, high - 1)}
    if high:
        harm = found.harm_LEW[:, :, high - 1]
        taken = widths_LE == high - 1
        assert not taken.any() or harm[taken].max() <= harm[~taken].min()
        more = widths_LE.copy()
        more.reshape(-1)[np.where(taken, np.inf, harm).argmin()] = high - 1
        assert total(found, more) > bound, "one more would have been too much"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0])
def test_d2moe_drops_planes_of_cold_experts_first(seed, share):
    found = evidence(seed=seed)
    full, least = (total(found, np.full((3, 5), w)) for w in (2, 0))
    bound = full + share * (least - full)
    widths_LE = d2moe(found, lambda w: total(found, w) <= bound)
    assert total(found, widths_LE) <= bound
    order = removals(found)
    assert sorted(order) == sorted(list(range(15)) * 2), "each expert can lose two planes"
    taken = int((2 - widths_LE).sum())
    assert np.array_equal(np.bincount(order[:taken], minlength=15).reshape(3, 5), 2 - widths_LE)
    if taken < 30:
        following = widths_LE.copy()
        following.reshape(-1)[order[taken]] -= 1
        assert total(found, following) > bound


def test_an_impossible_bound_has_no_widths():
    found = evidence()
    assert edgemoe(found, lambda w: False) is None and d2moe(found, lambda w: False) is None
    assert not edgemoe(found, lambda w: True).any() and not d2moe(found, lambda w: True).any()


def plan(opened, folder, quality, **more) -> tuple[ResidencyPlan, list[str]]:
    checkpoint, layout = opened(folder)
    said: list[str] = []
    options = {"tokens": TOKENS, "length": 32, "report": said.append, "trunk": "native"} | GIVEN | more
    return plan_quality(checkpoint, layout, "4GiB", quality=quality, **options), said


@pytest.mark.parametrize("method", ["edgemoe", "d2moe"])
def test_the_packed_model_is_what_was_measured(method, tmp_path, tiny, opened):
    """Within the bound on the text it was chosen on; and packing and running it gives the very numbers of the plan."""
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    made, said = plan(opened, folder, "kl:0.004" if method == "edgemoe" else "kl:0.02", precision=method)
    found = made.precision
    assert found is not None and found.chosen is not None and found.held_out is not None
    assert (
        found.method == f"engine.precision.{method}"
        and Bound.parse(found.bound).surely(found.chosen) <= Bound.parse(found.bound).limit
    )
    assert len(found.widths) > 1, "experts differ"
    assert made.codec == ("mixed" if method == "edgemoe" else "nested:32")
    assert any("within" in line for line in said) and any("outside" in line for line in said)
    assert ResidencyPlan.from_json(made.to_json()) == made
    assert f"held out {found.held_out.tokens} tokens" in made.summary()
    store = PackedStore(apply(made, checkpoint, layout, tmp_path / "p"), layout.facts)
    with Engine(checkpoint, layout, made, store=store, threads=1) as engine, Engine.open(folder, memory=4 << 30) as exact:
        chosen_on, held_out = parts(TOKENS, 32)
        for text, expected in ((chosen_on, found.chosen), (held_out, found.held_out)):
            again = measure(engine, text, exact)
            assert (again.tokens, again.perplexity) == (expected.tokens, pytest.approx(expected.perplexity, rel=1e-6))
            assert again.kl == pytest.approx(expected.kl, rel=1e-3)
        assert found.summary() in "; ".join(engine.changes) and engine.packed == ("" if method == "d2moe" else str(store.folder))
    assert made.memory.experts < layout.facts.expert_bytes


def test_what_is_known_of_experts_hardly_depends_on_how_many_tokens_are_looked_at(tiny, opened, monkeypatch):
    checkpoint, layout = opened(tiny("mixtral", **WIDE)[0])
    codecs = [parse_codec(name) for name in ("nested:32/2", "nested:32", "int8:32")]
    text = parts(TOKENS, 32)[0]
    with Trials(checkpoint, layout, 32, {"trunk": "native"}) as trials:
        whole = trials.evidence(text, codecs)
        monkeypatch.setattr(trial, "ROWS", 20)
        some = trials.evidence(text, codecs)
        experts_TK = np.concatenate([out.records[1].routing.experts_TK for out in trials.reference.run(text)])
    assert whole.counts_LE[1].tolist() == some.counts_LE[1].tolist() == np.bincount(experts_TK.reshape(-1), minlength=4).tolist()
    assert whole.counts_LE.max() > 40 and not np.array_equal(whole.harm_LEW, some.harm_LEW)
    np.testing.assert_allclose(some.harm_LEW, whole.harm_LEW, rtol=0.8)
    assert (np.diff(whole.harm_LEW, axis=2) < 0).all() and (np.diff(whole.bytes_LEW, axis=2) >= 0).all()  # in whole pages


def test_a_looser_bound_takes_fewer_bytes(tiny, opened):
    folder, _ = tiny("mixtral", **WIDE)
    read = []
    for bound in ("kl:0.001", "kl:0.01", "kl:10"):
        made, _ = plan(opened, folder, bound)
        assert made.precision is not None
        read.append(
            [
                int(name.split(":")[0].lstrip("uint"))
                for row in made.precision.experts_LE
                for name in (made.precision.widths[i] for i in row)
            ]
        )
    assert sum(read[0]) > sum(read[1]) > sum(read[2]) == 2 * len(read[2])


@pytest.mark.parametrize(("harder", "looks"), [(1.0, 1), (1.9, 2), (3.0, 3), (1000.0, 4)])
def test_what_is_chosen_must_hold_on_text_that_had_no_say(harder, looks, tiny, opened, monkeypatch):
    """The text held out loses `harder` times as much: more bits are chosen until it, too, is surely within the bound."""
    asked = []

    def measured(self, candidate, text, *, kl):
        held_out = text is not asked[0]
        bits = [{"int2:32": 2, "int3:32": 3, "int4:32": 4}[codec.name] for codec in candidate.values()]
        loss = 0.01 * sum(4 - b for b in bits) / len(bits) * (harder if held_out else 1)
        asked.append("held out" if held_out else "chosen")
        return Measured(100, 10 * (1 + loss), 10.0, 0.1, 1e-5, 1e-5)

    monkeypatch.setattr(Trials, "measured", measured)
    evidence = Trials.evidence
    monkeypatch.setattr(Trials, "evidence", lambda self, text, codecs: asked.append(text) or evidence(self, text, codecs))
    widths = {"widths": ("int2:32", "int3:32", "int4:32")}
    folder, _ = tiny("mixtral", **WIDE)
    if harder == 1000:
        with pytest.raises(InputError, match=r"(?s)held out .* have perplexity"):
            plan(opened, folder, "ppl:1.2%", **widths)
    else:
        made, said = plan(opened, folder, "ppl:1.2%", **widths)
        assert made.precision is not None and made.precision.held_out is not None
        assert made.precision.held_out.loss < 0.012 and sum("so more bits are chosen" in line for line in said) == looks - 1
    assert asked.count("held out") == looks


def test_what_a_trunk_loses_counts(tiny, opened):
    folder, _ = tiny("mixtral", **WIDE)
    with pytest.raises(InputError, match=r"(?s)the best has KL .*leave the trunk as stored") as error:
        plan(opened, folder, "kl:0.0002", trunk_codec="int3:32")
    assert "kl:0.0002" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": TOKENS[:200]}, "the text has 200 tokens"),
        ({"quality": "ppl"}, "is no bound"),
        ({"quality": "kl:5%"}, "is no bound"),
        ({"quality": "ppl:-1%"}, "is no bound"),
        ({"quality": "bits:3"}, "is no bound"),
        ({"widths": ("int8:32", "int4:32")}, "fewest bytes first"),
        ({"widths": ("bf16", "int8:32")}, "the widths are"),
        ({"widths": ("int4:32", "int8:128")}, "multiples of 128"),
        ({"widths": ("nested:32/2", "int8:32"), "precision": "d2moe"}, "planes of one nested codec"),
        ({"precision": "lru"}, "not a method of kind 'precision'"),
    ],
)
def test_what_is_refused(changes, said, tiny, opened):
    folder, _ = tiny("mixtral", **WIDE)
    with pytest.raises(InputError) as error:
        plan(opened, folder, **({"quality": "kl:1"} | changes))
    assert said in str(error.value)


def test_a_budget_that_cannot_work_is_refused_before_anything_is_tried(tiny, opened, monkeypatch):
    checkpoint, layout = opened(tiny("mixtral", **WIDE)[0])
    monkeypatch.setattr(Trials, "__init__", lambda *_, **__: pytest.fail("tried"))
    with pytest.raises(BudgetError):
        plan_quality(checkpoint, layout, "1MiB", quality="kl:1", tokens=TOKENS, length=32, **GIVEN)


def test_a_bound_is_kept_with_confidence():
    sure, unsure = Measured(100, 10.05, 10.0, 0.01, 0.001, 0.001), Measured(100, 10.05, 10.0, 0.01, 0.01, 0.01)
    for bound in (Bound("ppl", 0.01), Bound("kl", 0.015)):
        assert bound.loss(sure) == bound.loss(unsure) < bound.limit
        assert bound.loss(sure) < bound.surely(sure) < bound.limit < bound.surely(unsure)


def test_bounds():
    assert Bound.parse("ppl:1%") == Bound.parse("ppl:0.01") == Bound("ppl", 0.01) and str(Bound("ppl", 0.01)) == "ppl:1%"
    assert str(Bound.parse("kl:0.02")) == "kl:0.02"


def test_fewer_planes_on_request(tmp_path, tiny, opened, make_plan):
    """A nested store read at 2 bits, then at 4, then at 3: each as in an engine that never did anything else."""
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    out = pack(checkpoint, layout, "nested:32", tmp_path / "p")
    wanted = {}
    for planes in (2, 3, 4):
        with Engine.open(folder, memory=4 << 30, store=out, threads=1, planes=planes) as engine:
            assert engine.store.slot_bytes == engine.plan.memory.experts // sum(engine.plan.slots)
            assert (engine.packed == "") == (planes < 4)
            wanted[planes] = next(engine.run([TOKENS[:40]])).logits_TV
    assert not any(np.array_equal(wanted[a], wanted[b]) for a, b in ((2, 3), (3, 4)))
    plan = make_plan(layout, "medium", trunk="native", codec="nested:32")
    with Engine(checkpoint, layout, plan, store=PackedStore(out, layout.facts), threads=1) as engine:
        before = engine.reader.bytes_read
        read = []
        for planes in (2, 4, 3, 4):
            engine.limit(planes)
            np.testing.assert_array_equal(next(engine.run([TOKENS[:40]])).logits_TV, wanted[planes])
            read.append(engine.reader.bytes_read - before)
            before = engine.reader.bytes_read
        assert read[0] < read[2] < read[1] == read[3]
        with pytest.raises(InputError, match="quality is 5"):
            engine.limit(5)
    with Engine.open(folder, memory=4 << 30, threads=1) as engine, pytest.raises(InputError, match="not packed"):
        engine.limit(3)
    plain = pack(checkpoint, layout, "int4:32", tmp_path / "q")
    with pytest.raises(InputError, match="no planes to leave out"):
        Engine.open(folder, memory=4 << 30, store=plain, threads=1, planes=3)
