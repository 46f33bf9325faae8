import numpy as np
import pytest

from moestro.core.errors import CheckpointError
from moestro.core.experts import ExpertKey
from moestro.engine.cache import ExpertCache
from moestro.engine.evict.lru import Lru
from moestro.engine.store import SourceStore
from moestro.engine.table import Moment, SlotTable
from moestro.kernels.reader import Hurry, Reader

NOW = Moment(0, 0, False)


@pytest.fixture
def make(tiny, opened):
    readers = []

    def build(slots=3, scope="global", family="mixtral", store=None):
        checkpoint, layout = opened(tiny(family)[0])
        store = store or SourceStore(checkpoint, layout)
        readers.append(Reader())
        store.attach(readers[-1])
        layers = len(layout.facts.layers)
        table = SlotTable((slots,) if scope == "global" else (slots,) * layers, scope, lambda c, n: Lru(c, n), layers=layers)
        return ExpertCache(store, table, readers[-1])

    yield build
    for reader in readers:
        reader.close()


def keys(*experts):
    return [ExpertKey(0, e) for e in experts]


def values(lease):
    return {key: float(view.up.dequantise().sum()) for key, view in lease.ready()}


def test_hits_come_first_then_misses_in_issue_order(make):
    cache = make()
    with cache.acquire(keys(1), NOW) as lease:
        first = values(lease)
    with cache.acquire(keys(3, 1, 0), NOW) as lease:
        order = [key.expert for key, _ in lease.ready()]
    assert order == [1, 3, 0]
    with cache.acquire(keys(1), NOW) as lease:
        assert values(lease) == first
    assert cache.table.counts().hits == 2 and cache.table.counts().misses == 3


def test_slots_are_reused_and_hold_the_right_expert(make):
    large, small = make(4), make(1)
    expected = {}
    for e in range(4):
        with large.acquire(keys(e), NOW) as lease:
            expected |= values(lease)
    for e in [0, 1, 2, 3, 2, 2, 0]:
        with small.acquire(keys(e), NOW) as lease:
            assert values(lease) == {ExpertKey(0, e): expected[ExpertKey(0, e)]}
    assert len(set(expected.values())) == 4
    assert small.pool_bytes == small.store.slot_bytes


def test_waves_cover_a_demand_larger_than_the_cache(make):
    cache, reference = make(2), make(4)
    found = {}
    for lease in cache.waves(keys(0, 1, 2, 3), NOW):
        found |= values(lease)
    with reference.acquire(keys(0, 1, 2, 3), NOW) as lease:
        assert found == values(lease)


def test_a_hint_is_a_hit_and_its_bytes_count(make):
    cache = make(3)
    cache.fetch(cache.table.hint(keys(2), NOW), NOW, Hurry.SOON)
    before = cache.bytes_read(prefill=False)
    assert before > 0
    with cache.acquire(keys(2), NOW) as lease:
        assert set(values(lease)) == set(keys(2))
    assert cache.bytes_read(prefill=False) == before
    assert cache.table.counts().prefetch_used == 1


def pinned(cache, *experts):
    """The same cache with these experts of layer 0 pinned."""
    layers = cache.table.layers
    table = SlotTable((len(experts) + 1,), "global", lambda c, n: Lru(c, n), layers=layers, pinned=keys(*experts))
    return ExpertCache(cache.store, table, cache.reader)


def test_preloaded_experts_are_there_before_anybody_asks_and_count_as_if_they_were_not(make):
    cache, reference = pinned(make(), 0, 2), make(4)
    cache.preload()
    tickets = dict(cache._early)
    assert sorted(tickets) == keys(0, 2) and not cache.tickets and len(cache.table) == 0
    for ticket in tickets.values():
        cache.reader.wait(ticket)
    with cache.acquire(keys(0, 1, 2), NOW) as lease, reference.acquire(keys(0, 1, 2), NOW) as other:
        assert {k: cache.tickets[k] for k in keys(0, 2)} == tickets, "no second read"
        assert values(lease) == values(other)
    assert cache.table.counts() == reference.table.counts()
    assert cache.bytes_read(prefill=False) == reference.bytes_read(prefill=False)
    assert cache.reader.bytes_read == reference.reader.bytes_read, "each was read once"
    cache.preload()
    assert not cache._early, "both are in memory"


def test_what_is_preloaded_can_be_forgotten_and_drained(make):
    cache, reference = pinned(make(), 0, 1, 2), make(4)
    for end in (cache.drain, cache.forget):
        cache.preload()
        end()
        assert not cache._early
    cache.preload()
    with cache.acquire(keys(1), NOW) as lease, reference.acquire(keys(1), NOW) as other:
        assert values(lease) == values(other)


class Failing(SourceStore):
    """Fails to finish, or to issue, chosen experts."""

    def __init__(self, *given):
        super().__init__(*given)
        self.bad, self.unreadable = set(), set()

    def reads(self, key, slot):
        if key in self.unreadable:
            raise OSError("no such disk")
        found = super().reads(key, slot)
        return [r._replace(offset=1 << 40) for r in found] if key in self.bad else found


@pytest.mark.parametrize("how", ["bad", "unreadable"])
@pytest.mark.parametrize("waves", [False, True])
def test_a_failed_read_raises_and_leaves_nothing_resident(how, waves, make, tiny, opened):
    store = Failing(*opened(tiny("mixtral")[0]))
    cache = make(3, store=store)
    getattr(store, how).add(ExpertKey(0, 1))
    with pytest.raises(CheckpointError if how == "bad" else OSError):
        if waves:
            for lease in cache.waves(keys(0, 1, 2, 3), NOW):
                values(lease)
        else:
            with cache.acquire(keys(0, 1, 2), NOW) as lease:
                values(lease)
    assert ExpertKey(0, 1) not in cache.table
    assert all(key in cache.views or key in cache.tickets for key in cache.table.residents())
    getattr(store, how).clear()
    assert cache.table.room(0) == 3
    with cache.acquire(keys(0, 1, 2), NOW) as lease:
        assert set(values(lease)) == set(keys(0, 1, 2))


def test_an_error_of_the_caller_ends_the_lease(make):
    cache = make(2)
    with pytest.raises(ZeroDivisionError), cache.acquire(keys(0, 1), NOW):
        raise ZeroDivisionError
    with cache.acquire(keys(2, 3), NOW) as lease:
        assert len(values(lease)) == 2


def test_a_prefetch_that_is_evicted_while_it_is_read_harms_nothing(make):
    cache, reference = make(1), make(4)
    for e in range(4):
        with reference.acquire(keys(e), NOW) as lease:
            expected = values(lease)
        cache.fetch(cache.table.hint(keys((e + 1) % 4), NOW), NOW, Hurry.SOON)
        with cache.acquire(keys(e), NOW) as lease:
            assert values(lease) == expected
    cache.drain()
    assert not cache.tickets or all(k in cache.table for k in cache.tickets)


def test_a_wrong_guess_is_not_read_on_and_its_slot_holds_the_right_expert(make):
    cache, reference = make(3), make(4)
    for step in range(8):
        e = step % 4
        with reference.acquire(keys(e), NOW) as lease:
            expected = values(lease)
        cache.fetch(cache.table.hint(keys((e + 2) % 4, (e + 3) % 4), NOW), NOW, Hurry.SOON)
        for lease in cache.waves(keys(e), NOW):
            assert values(lease) == expected
        assert set(cache.views) | set(cache.tickets) == set(cache.table.residents())
        assert not {key.expert for key in cache.tickets}, "what was guessed and not asked for is gone"


def test_the_pool_costs_nothing_until_it_is_used(make):
    from moestro.engine import memory

    before = memory.usage().resident
    cache = make(4)
    table = SlotTable((100_000,), "global", lambda c, n: Lru(c, n), layers=3)
    big = ExpertCache(cache.store, table, cache.reader)
    assert big.pool_bytes > 500 << 20
    assert memory.usage().resident - before < 64 << 20
    assert not np.any(big.slot(99_999)[:10])
