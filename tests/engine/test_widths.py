"""Slots as large as each width needs: the same results, the same counts live and in replay, never more bytes, and fewer reads."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import BudgetError, InputError, PlanError
from moestro.core.experts import ExpertKey
from moestro.core.plans.residency import Precision, ResidencyPlan
from moestro.engine.engine import Engine
from moestro.engine.evict.lru import Lru
from moestro.engine.pack import pack
from moestro.engine.replay import GATE, NONE, replay
from moestro.engine.residency import decide, expert_sizes
from moestro.engine.sample import SamplingParams
from moestro.engine.store import PAGE, PackedStore
from moestro.engine.table import Moment
from moestro.engine.widths import Widths, WidthTable, split_by_use, split_evenly, staying, table_of
from tests.engine.test_residency import RATES, SIZES, facts, fixed
from tests.engine.traces import sticky, zipf

MIB = 1 << 20
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 128, 24)]
WIDE = {"hidden_size": 64, "intermediate_size": 64}


def halves(layers: int, experts: int, few: int = MIB, many: int = 3 * MIB) -> Widths:
    """Every other expert is wide."""
    rows = [[(la + e) % 2 for e in range(experts)] for la in range(layers)]
    return Widths.of(rows, [[many if w else few for w in row] for row in rows])


def test_all_but_one_of_a_pool_with_a_slot_for_each_stay():
    model, widths = facts(2, 4), halves(2, 4)
    every = [ExpertKey(la, e) for la in range(2) for e in range(4)]
    assert staying((7,), "global", model, ()) == []
    assert staying((8,), "global", model, ()) == every[:-1]
    assert staying((9,), "global", model, every[6:]) == every[:5], "pinned ones need no second place"
    assert staying((3, 4), "layer", model, ()) == every[4:7]
    assert staying((4, 3), "width", model, (), widths) == [every[0], every[2], every[5]]
    for slots, scope in (((8,), "global"), ((4, 4), "layer"), ((4, 4), "width")):
        table_of(slots, scope, Lru, layers=2, pinned=staying(slots, scope, model, (), widths), widths=widths)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_waves_give_each_expert_once_in_a_slot_of_its_width(data):
    layers, experts = 2, 6
    widths = halves(layers, experts)
    slots = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    table = WidthTable(slots, Lru, widths.widths_LE, layers=layers)
    for step in range(12):
        moment = Moment(step // layers, step % layers, False)
        keys = [ExpertKey(moment.layer, e) for e in data.draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True))]
        held: list[list] = []
        came = []
        for wave in table.waves(keys, moment):
            held = [*held[-1:], wave.placements] if min(slots) > 1 else [wave.placements]
            inside = [p.slot for part in held for p in part]
            assert len(set(inside)) == len(inside), "what is in use together lies apart"
            for p in wave.placements:
                wide = widths.widths_LE[p.key.layer][p.key.expert]
                assert slots[0] * wide <= p.slot < slots[0] + slots[1] * wide and table.slot_of(p.key) == p.slot
                came.append(p.key)
        assert sorted(came) == sorted(keys)
        assert all(table.room(layer) == min(slots) for layer in range(layers)), "everything has been released"
    assert table.counts().demands == table.counts().hits + table.counts().misses and len(table) == len(table.residents())


def test_one_width_is_a_shared_pool():
    trace = zipf(prefill=20)
    one = Widths.of(*([[value] * n for n in trace.num_experts] for value in (0, 5 * PAGE)))
    total = sum(trace.num_experts)
    for n in (total // 4, total // 2):
        for options in ({}, {"predictor": "engine.predict.previous", "prefetch": 2}):
            a, b = (replay(trace, (n,), scope, widths=one, **options) for scope in ("global", "width"))
            assert replace(a, scope="") == replace(b, scope="")
            assert a.missed_bytes[True] == a.decode.misses * 5 * PAGE and a.read_bytes[True] == a.decode.loads * 5 * PAGE


def test_splits_fit_and_leave_little():
    widths = halves(4, 8)
    low = widths.least_W([2] * 4)
    assert low == (2, 2) and widths.experts_W == (16, 16) and widths.slot_bytes_W == (MIB, 3 * MIB)
    counts_LE = np.random.default_rng(0).integers(1, 100, (4, 8)) + 1000 * np.array(widths.widths_LE)
    for capacity in range(8 * MIB, 70 * MIB, MIB // 2):
        for slots in (split_evenly(capacity, widths, low), split_by_use(capacity, widths, low, counts_LE)):
            taken = sum(n * size for n, size in zip(slots, widths.slot_bytes_W))
            assert taken <= capacity and all(a <= n <= 16 for a, n in zip(low, slots))
            if capacity >= 64 * MIB:
                assert slots == (16, 16)
        left = capacity - sum(n * size for n, size in zip(split_evenly(capacity, widths, low), widths.slot_bytes_W))
        assert left < 3 * MIB or capacity > 64 * MIB
    assert split_by_use(50 * MIB, widths, low, counts_LE) == (2, 16), "the wide ones are used more"


def test_a_plan_takes_slots_by_width_where_that_reads_less():
    model = facts()
    widths = halves(len(model.layers), model.layers[0].num_experts)
    precision = Precision("by hand", ("int2:32", "int8:32"), widths.widths_LE)
    more = {"slot_bytes": 3 * MIB, "precision": precision, "codec": "mixed", "widths": widths, "chunk": 32, "context": 256}

    def plan(nbytes: int, **options) -> ResidencyPlan:
        return decide("toy", model, memory=fixed(chunk=32) + nbytes, **(SIZES | RATES | more | options))

    for trace in (None, replace(sticky(), model=model.fingerprint)):
        for nbytes in (24 * MIB, 50 * MIB, 80 * MIB):
            made = plan(nbytes, trace=trace)
            assert made.scope == "width" and made.memory.experts <= nbytes
            assert made.memory.experts == sum(n * size for n, size in zip(made.slots, widths.slot_bytes_W))
            assert ResidencyPlan.from_json(made.to_json()) == made
            if trace is not None:
                before = replay(trace, plan(nbytes, scope="global").slots, widths=widths)
                now = replay(trace, made.slots, "width", made.eviction, widths=widths)
                assert now.missed_bytes[True] < before.missed_bytes[True]
    whole = plan(96 * MIB)
    assert sum(whole.slots) == sum(la.num_experts for la in model.layers) and whole.memory.experts == 96 * MIB
    assert plan(50 * MIB, scope="global").slots == (16,)
    with pytest.raises(BudgetError) as error:
        plan(4 * MIB, scope="width")
    assert error.value.smallest == fixed(chunk=32) + 8 * MIB
    with pytest.raises(PlanError, match="slots per width"):
        replace(whole, slots=(99, 1)).check(model)
    with pytest.raises(InputError, match="one width"):
        plan(50 * MIB, scope="width", widths=None)
    with pytest.raises(InputError, match="one width"):
        table_of((4,), "width", Lru, layers=1)


@pytest.mark.parametrize("predictor", [NONE, GATE])
def test_results_do_not_depend_on_the_slots(tmp_path, tiny, opened, make_plan, predictor):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    rows = tuple(tuple((la.ordinal + e) % 2 for e in range(la.num_experts)) for la in layout.facts.layers)
    precision = Precision("by hand", ("int2:32", "int8:32"), rows)
    out = pack(checkpoint, layout, "mixed", tmp_path / "p", widths=precision)
    sizes_LE = expert_sizes(checkpoint, layout, "mixed", precision)
    widths = Widths.of(rows, sizes_LE)
    assert widths.slot_bytes_W[0] < widths.slot_bytes_W[1] == PackedStore(out, layout.facts).slot_bytes
    mixed = {"trunk": "native", "codec": "mixed", "precision": precision, "predictor": predictor}
    mixed["prefetch"] = 2 * (predictor != NONE)
    found = []
    for scope, slots in (("global", (4,)), ("width", (2, 2)), ("width", (1, 1)), ("width", (3, 2))):
        plan = replace(make_plan(layout, **mixed), scope=scope, slots=slots)
        with Engine(checkpoint, layout, plan, store=PackedStore(out, layout.facts), threads=1, trace=True) as engine:
            found.append(engine.generate(TOKENS, SamplingParams(max_tokens=6, ignore_eos=True)).run()[0].tokens)
            counted = engine.cache.table.counts()
            again = replay(
                engine.trace(), slots, scope, plan.eviction, widths=widths, predictor=predictor, prefetch=plan.prefetch
            )
            assert again.decode + again.prefill == counted
            assert engine.cache.bytes_read(prefill=False) == again.read_bytes[True]
            if scope == "width":
                assert engine.cache.pool_bytes == sum(n * size for n, size in zip(slots, widths.slot_bytes_W))
    assert all(tokens == found[0] for tokens in found)
