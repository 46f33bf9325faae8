import json
import os
import shutil

import numpy as np
import pytest

from moestro.core.errors import CheckpointError
from moestro.core.experts import ExpertKey
from moestro.engine.store import PAGE, SourceStore, broken, load, runs
from moestro.kernels.ffn import Matrix
from moestro.kernels.reader import Reader
from moestro.models.codecs import source
from moestro.models.layout import Part
from moestro.testing.tiny import FAMILIES, layouts


def part(role, offset, nbytes, file="a"):
    from pathlib import Path

    return Part(role, Path(file), offset, nbytes, "BF16", (1, nbytes // 2))


def test_touching_parts_are_one_read_and_far_ones_are_apart():
    found, places, taken = runs([part("up", 5000, 6000), part("gate", 100, 4900), part("down", 90_000, 100)])
    assert [(r.start, r.nbytes, r.at) for r in found] == [(0, 12288, 0), (86016, 4096, 12288)]
    assert places == [5000, 100, 12288 + 90_000 - 86016] and taken == 16384


def test_every_read_is_aligned_and_holds_its_parts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = [part("up", int(o) * 2, int(n) * 2, f) for o, n, f in zip(*rng.integers(1, 20_000, (2, 5)), "aabab")]
        found, places, taken = runs(parts)
        assert all(v % PAGE == 0 for r in found for v in (r.start, r.nbytes, r.at))
        assert taken == sum(r.nbytes for r in found)
        for p, at in zip(parts, places):
            assert any(
                r.file == p.file and r.start + (at - r.at) == p.offset and at + p.nbytes <= r.at + r.nbytes
                for r in found
                if at >= r.at
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_in_its_slot_equals_the_checkpoints(family, dtype, tiny, opened):
    for layout_name in layouts(family):
        if dtype != "float32" and layout_name != layouts(family)[0]:
            continue
        checkpoint, layout = opened(tiny(family, layout_name, dtype)[0])
        store = SourceStore(checkpoint, layout)
        with Reader() as reader:
            store.attach(reader)
            for layer in layout.facts.layers:
                key = ExpertKey(layer.ordinal, layer.num_experts - 1)
                view, slot = load(store, reader, key)
                parts = layout.parts(key)
                expected = source.view(parts, source.load(checkpoint, parts))
                inside = range(slot.ctypes.data, slot.ctypes.data + slot.nbytes)
                for name in ("gate", "up", "down"):
                    ours, theirs = getattr(view, name), getattr(expected, name)
                    np.testing.assert_array_equal(ours.dequantise(), theirs.dequantise())
                    assert ours.format == theirs.format
                    assert ours.data.ctypes.data in inside  # a view: nothing was copied elsewhere
                    bias = getattr(view, f"{name}_bias")
                    assert (bias is None) == (not layer.spec.bias)
                    if bias is not None:
                        np.testing.assert_array_equal(bias, getattr(expected, f"{name}_bias"))
                        assert bias.ctypes.data in inside


@pytest.mark.parametrize("form", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(form, value):
    data = np.random.default_rng(0).normal(size=(300, 701)).astype(np.float32)
    for at in [(0, 0), (299, 700), (150, 3), None]:
        array = data.copy()
        if at:
            array[at] = value
        if form == "bf16":
            array = (array.view(np.uint32) >> 16).astype(np.uint16)
            if at and np.isnan(value):
                array[at] = 0x7FC0
        elif form == "f16":
            array = array.astype(np.float16)
        assert broken(Matrix(array, form)) == (at is not None)


def test_a_broken_expert_is_named_when_it_is_first_used(tmp_path, tiny, opened, engine):
    folder = tmp_path / "m"
    shutil.copytree(tiny("mixtral")[0], folder)
    checkpoint, _ = opened(folder)
    name = next(n for n in checkpoint.tensors if "experts.2.w2" in n and "layers.1." in n)
    ref = checkpoint.tensors[name]
    with open(ref.file, "r+b") as f:
        f.seek(ref.offset + 40)
        f.write(np.array([np.nan], np.float32).tobytes())
    made = engine(folder, "minimal")
    with pytest.raises(CheckpointError, match=r"decoder layer 1, expert 2: .*experts\.2\.w2"):
        list(made.run([list(range(3, 60))]))
    assert ExpertKey(1, 2) not in made.cache.table
    # Repaired files are other files: this engine notices, a new one runs.
    with open(ref.file, "r+b") as f:
        f.seek(ref.offset + 40)
        f.write(np.array([0.5], np.float32).tobytes())
    os.utime(ref.file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="chang"):
        made.generate([3, 4]).run()
    assert np.isfinite(next(engine(folder, "minimal").run([[3, 4, 5]])).logits_TV).all()


def test_a_changed_file_is_refused_before_a_generation(tmp_path, tiny, engine):
    folder = tmp_path / "m"
    shutil.copytree(tiny("mixtral")[0], folder)
    made = engine(folder)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(5, 5))
    with pytest.raises(CheckpointError, match="chang"):
        made.generate([3, 4, 5]).run()


def test_an_expert_may_end_at_the_end_of_its_file(tmp_path, tiny, opened):
    """The last page of a file is read beyond its end."""
    from safetensors.numpy import load_file, save_file

    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    folder, _ = tiny("mixtral")
    tensors = load_file(folder / "model.safetensors")
    expert = {name: value for name, value in tensors.items() if ".2.block_sparse_moe.experts.3." in name}
    save_file({name: value for name, value in tensors.items() if name not in expert}, tmp_path / "model-1.safetensors")
    save_file(expert, tmp_path / "model-2.safetensors")
    index = {name: f"model-{1 + (name in expert)}.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / "config.json", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    layout = describe(checkpoint)
    key = ExpertKey(2, 3)
    assert any(r.start + r.nbytes > r.file.stat().st_size for r in runs(layout.parts(key))[0])
    store, whole = SourceStore(checkpoint, layout), SourceStore(*opened(folder))
    with Reader() as reader, Reader() as other:
        store.attach(reader), whole.attach(other)
        (a, _x), (b, _y) = load(store, reader, key), load(whole, other, key)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(getattr(a, name).data, getattr(b, name).data)
