"""Running probes: what is counted is what is routed, engine and module agree, files say what is wrong with them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moestro.core.errors import InputError, ProfileError, TraceError
from moestro.core.method import card_of, catalogue
from moestro.core.trace import Trace
from moestro.engine.engine import Engine
from moestro.engine.native import NativeTrunk
from moestro.profile.coverage import coverage
from moestro.profile.data import cut
from moestro.profile.probe import make, needed_by, requires, standard
from moestro.profile.profile import Profile, is_profile, trace_path
from moestro.profile.run import Recording, available, sampled
from moestro.profile.sources import Document
from moestro.profile.statistics import Sum


def counted(case) -> np.ndarray:
    """Every counted token, once."""
    return np.concatenate([s.tokens_T[s.counted_T] for s in case.texts.sequences])


def test_counts_are_the_planted_routing(case):
    tokens = counted(case)
    made = case.profile("counts")
    routed_LTK = case.planted.truth.experts(tokens)
    wanted = [np.bincount(ids.reshape(-1), minlength=14) for ids in routed_LTK]
    assert (made.need("counts", "counts_LE") == np.stack(wanted)).all()
    assert made.tokens == len(tokens) == 9 * 40, "tokens of the overlap are context, and counted once"


def test_the_engine_gives_the_same_statistics(case):
    names = [row["name"] for row in catalogue() if row["kind"] == "probe" and "attention" not in row["needs"]]
    with Engine.open(case.planted.path) as engine:
        assert engine.plan.trunk == "native"
        assert available(engine, case.texts) == {"inputs", "experts", "logits", "residual"}
        found = case.profile(*names, runner=engine)
        demands = engine.cache.table.counts().demands
        engine.weights(next(iter(engine.cache.views)))
        assert engine.cache.table.counts().demands == demands
    wanted = case.profile(*names)
    for name, array in wanted.arrays.items():
        if array.dtype.kind == "f":
            assert np.allclose(found.arrays[name], array, rtol=1e-4, atol=1e-3), name
        elif name in ("kept_x_LND", "kept_weights_LNK"):  # bits of halves
            assert np.allclose(found.arrays[name].view(np.float16), array.view(np.float16), rtol=2e-3, atol=1e-3), name
        elif name not in ("active_LEF", "kept_LQ"):  # these count what is above a threshold, where the last bit decides
            assert np.array_equal(found.arrays[name], array), name


def test_the_engine_knows_routers_and_stream_also_of_a_single_row(case):
    """A pass of one row has a way of its own through the native trunk; its last piece here is one."""
    tokens = case.texts.sequences[0].tokens_T[:9].tolist()
    (wanted,) = case.model.run([tokens], inputs=True)
    with Engine.open(case.planted.path, chunk=8) as engine:
        assert engine.pieces(9, 1)[-1] == slice(8, 9)
        (found,) = engine.run([tokens], inputs=True)
        (without,) = engine.run([tokens])
        for record, other, plain in zip(found.records, wanted.records, without.records, strict=True):
            assert np.allclose(record.routing.logits_TE, other.routing.logits_TE, rtol=1e-4, atol=1e-4)
            assert np.allclose(record.residual_TD, other.residual_TD, rtol=1e-4, atol=1e-4)
            assert np.array_equal(plain.routing.logits_TE, record.routing.logits_TE) and plain.residual_TD is None
        assert isinstance(engine.trunk, NativeTrunk) and engine.trunk.watch is None


def reads_of(store) -> list[tuple[int, int]]:
    """(layer, expert) of every read that the store is asked for from now on."""
    found, reads = [], store.reads

    def watched(key, slot):
        found.append(tuple(key))
        return reads(key, slot)

    store.reads = watched
    return found


def test_beyond_memory_a_pass_reads_each_expert_it_needs_once(case):
    """Two slots per layer, less than a pass needs: its experts come in waves, each once, and the statistics stay the same."""
    names = ["counts", "gates", "tokens", "entropy"]
    wanted = case.profile(*names)
    with Engine.open(case.planted.path) as engine:
        plan = dataclasses.replace(
            engine.plan, slots=(2,) * len(engine.facts.layers), scope="layer", pinned=(), predictor="engine.predict.none"
        )
    for chunk in (24, 8):
        with Engine.open(case.planted.path, plan=dataclasses.replace(plan, chunk=chunk)) as engine:
            read = reads_of(engine.store)
            found = case.profile(*names, runner=engine)
            passes = sum(len(engine.pieces(len(s.tokens_T), 1)) for s in case.texts.sequences)
        ends = [0, *(i for i in range(1, len(read)) if read[i][0] < read[i - 1][0]), len(read)]
        each = [read[a:b] for a, b in itertools.pairwise(ends)]
        assert len(each) == passes, "layer by layer within a pass"
        assert all(len(set(keys)) == len(keys) for keys in each) and max(map(len, each)) > 2 * len(plan.slots)
        for name, array in wanted.arrays.items():
            assert np.allclose(found.arrays[name], array, rtol=1e-4, atol=1e-3) and (
                array.dtype.kind == "f" or np.array_equal(found.arrays[name], array)
            ), name


def test_a_probe_that_the_runner_cannot_feed_is_refused(case):
    with Engine.open(case.planted.path, trunk="transformers") as engine:
        with pytest.raises(InputError, match="needs logits"):
            case.record("entropy", runner=engine)
        assert "profile.probes.entropy" not in standard(available(engine, case.texts))
    assert "profile.probes.entropy" in standard(available(case.model, case.texts))


def test_what_methods_need_is_what_is_run():
    measure = "profile.measures.super_experts"
    assert needed_by([measure]) == ["maxima"]
    assert requires(make({"maxima": {}})) == {"inputs", "experts"}
    with pytest.raises(InputError, match="reads no statistics"):
        needed_by(["engine.evict.lru"])


def test_options_of_probes_are_checked():
    with pytest.raises(InputError, match="no option 'size'"):
        make({"tokens": {"size": 3}})
    with pytest.raises(InputError, match="most is 'many'"):
        make({"tokens": {"most": "many"}})


def test_an_interrupted_run_keeps_whole_sequences(case, tmp_path):
    class Stops:
        facts, weights = case.model.facts, case.model.weights
        left = 4

        def run(self, tokens, *, inputs=False):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return case.model.run(tokens, inputs=inputs)

    probes = make({"counts": {}, "gates": {}})
    stopped = Recording(case.model, case.texts, probes)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(Stops(), save=tmp_path / "p")
    again = Recording(case.model, case.texts, probes)
    again.restore(tmp_path / "p")
    assert again.done_S.sum() == 4
    again.run(case.model)
    wanted = case.profile("counts", "gates")
    assert all(np.array_equal(a, wanted.arrays[n]) for n, a in again.profile().arrays.items())


def test_a_broken_partial_file_is_named(case, tmp_path):
    recording = case.record("counts")
    recording.save(tmp_path / "p")
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-5])
    with pytest.raises(ProfileError, match="not a readable profile"):
        recording.restore(tmp_path / "p")


def test_a_profile_round_trips_with_its_trace(case, tmp_path):
    made = case.profile("counts", "gates", trace_weights=True)
    path = tmp_path / "a.profile"
    made.save(path)
    read = Profile.open(path)
    assert is_profile(path) and not is_profile(trace_path(path))
    for field in dataclasses.fields(Profile):
        if field.name not in ("arrays", "trace"):
            assert getattr(read, field.name) == getattr(made, field.name), field.name
    assert all(np.array_equal(read.arrays[n], a) for n, a in made.arrays.items())
    assert read.trace is not None and np.array_equal(read.trace.experts_LTK, made.trace.experts_LTK)
    assert read.trace.weights_LTK is not None and (np.diff(read.trace.weights_LTK.astype(float), axis=2) <= 0).all()
    case.profile("counts", trace_tokens=0).save(path)
    assert not trace_path(path).exists(), "no trace of an older profile stays beside a new one"


def test_broken_files_are_named(case, tmp_path):
    path = tmp_path / "a.profile"
    made = case.profile("counts")
    made.save(path)
    with pytest.raises(ProfileError, match="made with the model"):
        made.check_model("0" * 64)
    with pytest.raises(InputError, match="no label 'x'"):
        made.label("x")
    with pytest.raises(ProfileError, match="holds no mass_LE"):
        made.need("gates", "mass_LE")
    beside = trace_path(path).read_bytes()
    trace_path(path).write_bytes(beside[:-9])
    with pytest.raises(TraceError, match="cut short"):
        Profile.open(path)
    case.profile("counts", texts=cut([Document("a", "x", tokens=[1, 2, 3])], None)).trace.save(trace_path(path))
    with pytest.raises(ProfileError, match="is not the trace of"):
        Profile.open(path)
    trace_path(path).unlink()
    with pytest.raises(ProfileError, match="has no trace"):
        Profile.open(path).need_trace()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ProfileError, match="not a readable profile"):
        Profile.open(path)
    with pytest.raises(ProfileError, match="there is no profile"):
        Profile.open(tmp_path / "none")


def test_the_trace_is_the_planted_routing(case):
    trace = case.profile("counts").trace
    assert trace is not None and trace.tokens == sum(len(s.tokens_T) for s in case.texts.sequences)
    wanted = case.planted.truth.experts(trace.tokens_T)
    assert np.array_equal(trace.experts_LTK, wanted), "the truth has the heaviest first, and so has the trace"
    assert trace.info["label_of_sequence"][:3] == [0, 0, 1]


def test_a_trace_costs_little_on_disk(case, tmp_path):
    made = case.profile("counts")
    made.trace.save(tmp_path / "t")
    assert Trace.open(tmp_path / "t").experts_LTK.dtype == np.int8
    slots = made.trace.experts_LTK.size
    assert (tmp_path / "t").stat().st_size - 1000 < slots + 17 * made.trace.tokens


@pytest.mark.parametrize("tokens", [1, 24, 100, 200, 10**6])
def test_a_sample_is_whole_sequences_of_about_the_size(case, tokens):
    chosen = sampled(case.texts, tokens)
    lengths = np.array([len(s.tokens_T) for s in case.texts.sequences])
    assert chosen.any() and abs(lengths[chosen].sum() - min(tokens, lengths.sum())) <= 24
    assert not sampled(case.texts, 0).any()


def test_coverage_finds_the_idle_experts(case):
    made = case.profile("counts")
    found = coverage(made, few=10**6)
    truth = case.planted.truth
    for layer in range(2):
        used = set().union(*(truth.domain_experts(g, layer) for g in range(3)))
        assert set(found.never[layer]) == set(range(14)) - used and set(found.rarely[layer]) == used
    assert found.unseen == 4 and "4 of 28 experts never chosen" in found.told()[0]
    assert coverage(made, few=1).rarely == ((), ())


def test_statistics_that_take_too_much_are_refused(case):
    with pytest.raises(InputError, match="moments alone"):
        Recording(case.model, case.texts, make({"counts": {}, "moments": {"full": True}}), most_bytes=10**6)


def test_sums_are_exact_in_any_order():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) * 10.0 ** rng.integers(-6, 9, 1000)
    one, other = Sum(1), Sum(1)
    for v in values:
        one.add(0, v)
    for v in rng.permutation(values):
        other.add(0, v)
    assert one.value()[0] == other.value()[0]
    assert one.value()[0] == pytest.approx(values.sum(), abs=1000 * 2**-34 + 1e-6)
    one.add(0, np.inf)
    with pytest.raises(InputError, match="not a number"):
        one.value()


def test_every_probe_needs_what_its_header_says():
    for row in catalogue():
        if row["kind"] == "probe":
            assert all(need in row["header"]["Needs"] for need in row["needs"]), row["name"]
    assert card_of(make({"norms": {}})["profile.probes.norms"]).kind == "probe"
