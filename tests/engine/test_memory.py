import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moestro.engine import memory


def test_usage_sees_what_is_touched_and_what_is_freed():
    memory.settle()
    before = memory.usage()
    block = np.ones(64 << 20, np.uint8)
    during = memory.usage()
    assert during.resident - before.resident >= 60 << 20
    assert during.peak >= during.resident
    del block
    assert memory.usage().resident - before.resident < 16 << 20


def test_cgroup_version_2(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, value in {"memory.current": "700", "memory.peak": "900", "memory.max": "max"}.items():
        (tmp_path / "a" / "b" / name).write_text(value + "\n")
    (tmp_path / "a" / "memory.max").write_text("5000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert memory.cgroup(tmp_path, membership) == (700, 900, 5000)


def test_cgroup_version_1(tmp_path):
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    for name, value in {"usage_in_bytes": 10, "max_usage_in_bytes": 20, "limit_in_bytes": 30}.items():
        (folder / f"memory.{name}").write_text(str(value))
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/x\n3:memory:/job\n")
    assert memory.cgroup(tmp_path, membership) == (10, 20, 30)


def test_a_container_sees_its_cgroup_as_the_root(tmp_path):
    for name in ("memory.current", "memory.peak", "memory.max"):
        (tmp_path / name).write_text("123")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/docker/abc\n")
    assert memory.cgroup(tmp_path, membership) == (123, 123, 123)


def test_no_cgroup(tmp_path):
    assert memory.cgroup(tmp_path, tmp_path / "missing") == (None, None, None)


def test_available_is_something_real():
    assert 64 << 20 < memory.available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


RUN = """
import sys
from pathlib import Path
from moestro.engine.engine import Engine
from moestro.engine.sample import SamplingParams
from moestro.engine import memory
budget = int(sys.argv[2])
with Engine.open(sys.argv[1], memory=budget, context=512, threads=1, trunk=sys.argv[3]) as engine:
    tokens = [3 + i % 120 for i in range(300)]
    generation = engine.generate(tokens, SamplingParams(max_tokens=40, ignore_eos=True))
    generation.run()
    said = generation.statistics
    print(memory.usage().peak, engine.plan.memory.total, engine.cache.pool_bytes, said.decode_bytes, engine.checkpoint.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is in /proc")
@pytest.mark.parametrize(("trunk", "runtime"), [("transformers", 416 << 20), ("native", 112 << 20)])
def test_the_memory_budget_is_kept(tmp_path, tiny, trunk, runtime):
    """About 500 MiB of experts within a budget that cannot hold half of them beside the runtime."""
    folder, _ = tiny(
        "mixtral", hidden_size=512, intermediate_size=1408, num_local_experts=16, num_hidden_layers=4, max_position_embeddings=512
    )
    size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    budget = runtime + size * 2 // 5
    code = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(budget), trunk], capture_output=True, text=True, timeout=100
    )
    assert code.returncode == 0, code.stderr
    peak, planned, pool, read, checkpoint = map(int, code.stdout.split())
    assert peak <= budget, f"{peak >> 20} MiB used, {budget >> 20} allowed, {planned >> 20} planned"
    assert planned <= budget
    assert pool < checkpoint * 2 // 3 and read > 0
