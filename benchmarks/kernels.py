"""How fast are the expert kernels, against this machine's memory, its numpy and torch?

One token, a few and many per expert, eight experts of one layer of OLMoE's shape (width 2048, expert width 1024) taken in turn
from more weights than the caches hold. GB/s of weights are set beside the memory's rate probed in the same minute; `ratio` is the
kernel's speed over torch's (bf16 and f32 only) or over the numpy reference. Kernel and peer take turns, medians with spread.

    python benchmarks/kernels.py [--quick] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from moestro.kernels import native
from moestro.kernels.bandwidth import probe
from moestro.kernels.combine import combine, reference_combine
from moestro.kernels.convert import reference_to_bf16, reference_to_f32, split_gate_up, to_bf16, to_f32
from moestro.kernels.ffn import FORMATS, ExpertView, Matrix, grouped_ffn, reference_grouped_ffn
from moestro.kernels.packed import pack, quantise
from moestro.kernels.permute import reference_sort_pairs, sort_pairs
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4
from moestro.kernels.topk import reference_topk, topk

WIDTH, INNER, EXPERTS = 2048, 1024, 8


def machine() -> str:
    """The processor's name as the kernel knows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def alternate(*jobs: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Seconds of each job, the jobs taking turns, so that a drifting host touches all alike."""
    spent: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds + 1):
        for job, times in zip(jobs, spent):
            began = time.perf_counter()
            job()
            if turn:  # the first turn warms up
                times.append(time.perf_counter() - began)
    return spent


def summary(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times) * 1e3, "ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3}


def experts_of(format: str, count: int, rng: np.random.Generator) -> list[ExpertView]:
    def matrix(rows: int, cols: int) -> Matrix:
        w = rng.standard_normal((rows, cols), np.float32) / np.sqrt(cols, dtype=np.float32)
        encoders: dict[str, Callable[[np.ndarray], Matrix]] = {
            "f32": lambda w: Matrix(w, "f32"),
            "f16": lambda w: Matrix(w.astype(np.float16), "f16"),
            "bf16": lambda w: Matrix(to_bf16(w), "bf16"),
            "int8": lambda w: encode_int8(w, 64, scale_dtype="float16"),
            "int4": lambda w: encode_int4(w, 32, scale_dtype="float16"),
            "mxfp4": encode_mxfp4,
        }
        return encoders[format](w)

    return [ExpertView(matrix(INNER, WIDTH), matrix(INNER, WIDTH), matrix(WIDTH, INNER)) for _ in range(count)]


def torch_peer(experts: list[ExpertView], x: np.ndarray, rows: int, threads: int) -> Callable[[int], Any] | None:
    """The same eight experts through torch's linear, weights shared; None without torch or for formats it has no product for."""
    if experts[0].up.format not in ("bf16", "f32"):
        return None
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)

    def tensor(m: Matrix | None) -> Any:
        assert m is not None
        return torch.from_numpy(m.data).view(torch.bfloat16) if m.format == "bf16" else torch.from_numpy(m.data)

    weights = [(tensor(e.gate), tensor(e.up), tensor(e.down)) for e in experts]
    inputs = torch.from_numpy(x).to(weights[0][0].dtype)
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

    def run(first: int) -> None:
        with torch.inference_mode():
            for i in range(EXPERTS):
                gate, up, down = weights[(first + i) % len(weights)]
                part = inputs[i * rows : (i + 1) * rows]
                linear(silu(linear(part, gate)) * linear(part, up), down)

    return run


def feed_forward(format: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    experts = experts_of(format, 2 * EXPERTS if format == "f32" else 4 * EXPERTS, rng)
    found = []
    for rows in tokens:
        x = rng.standard_normal((rows * EXPERTS, WIDTH), np.float32)
        out, order, starts = np.empty_like(x), np.arange(rows * EXPERTS), np.arange(EXPERTS + 1) * rows
        for threads in sorted({1, native.cores()}):
            turn = iter(range(0, 1 << 30, EXPERTS))

            def chosen(turn: Any = turn) -> list[ExpertView]:
                first = next(turn)
                return [experts[(first + i) % len(experts)] for i in range(EXPERTS)]

            def ours(threads: int = threads, x: np.ndarray = x, out: np.ndarray = out, order: np.ndarray = order,
                     starts: np.ndarray = starts, chosen: Any = chosen) -> None:  # fmt: skip
                grouped_ffn(x, order, starts, chosen(), activation="silu", out_ND=out, threads=threads)

            jobs: list[Callable[[], Any]] = [ours]
            peer_name = ""
            if peer := torch_peer(experts, x, rows, threads):
                peer_name = "torch"
                jobs.append(lambda peer=peer, turn=turn: peer(next(turn)))
            elif rows == 1:
                peer_name = "numpy"
                jobs.append(
                    lambda x=x, order=order, starts=starts, out=out, chosen=chosen: reference_grouped_ffn(
                        x, order, starts, chosen(), activation="silu", out_ND=out
                    )
                )
            memory = probe(0.05, threads=threads)
            times = alternate(*jobs, rounds=rounds if rows <= 16 else max(3, rounds // 4))
            seconds = statistics.median(times[0])
            row: dict[str, Any] = {"what": "grouped_ffn", "format": format, "rows": rows, "threads": threads, **summary(times[0])}
            row["gb_per_s"] = experts[0].nbytes * EXPERTS / seconds / 1e9
            row["memory_gb_per_s"] = memory / 1e9
            row["gflop_per_s"] = 6 * rows * EXPERTS * WIDTH * INNER / seconds / 1e9
            if peer_name:
                row |= {"peer": peer_name, "peer_ms": statistics.median(times[1]) * 1e3}
                row["ratio"] = statistics.median(times[1]) / seconds
            found.append(row)
            print(
                f"{format:6} {rows:4} rows {threads} threads {row['ms']:8.2f} ms {row['gb_per_s']:6.1f} of {row['memory_gb_per_s']:5.1f}"
                f" GB/s {row['gflop_per_s']:6.1f} GFLOP/s  {row.get('ratio', float('nan')):5.2f} x {peer_name}",
                flush=True,
            )
    return found


def others(rounds: int) -> list[dict[str, Any]]:
    """The smaller kernels against their numpy references."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((512, 128), np.float32)
    ids, values = topk(scores, 8)
    pairs = sort_pairs(ids, values, 128)
    out, y = rng.standard_normal((512 * 8, WIDTH), np.float32), np.empty((512, WIDTH), np.float32)
    w = rng.standard_normal((INNER, WIDTH), np.float32)
    bits, floats, raw = to_bf16(w), np.empty_like(w), to_bf16(rng.standard_normal((WIDTH, 2 * INNER), np.float32))
    fused = {"transposed": True, "interleaved": True}
    jobs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "topk": (lambda: topk(scores, 8), lambda: reference_topk(scores, 8)),
        "sort_pairs": (lambda: sort_pairs(ids, values, 128), lambda: reference_sort_pairs(ids, values, 128)),
        "combine": (
            lambda: combine(out, pairs.token_N, pairs.slot_N, pairs.weight_N, y),
            lambda: reference_combine(out, pairs.token_N, pairs.slot_N, pairs.weight_N, y),
        ),
        "to_f32": (lambda: to_f32(bits, floats), lambda: reference_to_f32(bits, floats)),
        "to_bf16": (lambda: to_bf16(w, bits), lambda: reference_to_bf16(w, bits)),
        "split_gate_up": (
            lambda: split_gate_up(raw, **fused),
            lambda: (np.ascontiguousarray(raw[:, 0::2].T), np.ascontiguousarray(raw[:, 1::2].T)),
        ),
        "encode_int8": (lambda: quantise(w, "int8", 64), lambda: pack(encode_int8(w, 64, scale_dtype="float16"))),
        "encode_int4": (lambda: quantise(w, "int4", 32), lambda: pack(encode_int4(w, 32, scale_dtype="float16"))),
        "encode_mxfp4": (lambda: quantise(w, "mxfp4", 32), lambda: pack(encode_mxfp4(w))),
    }
    found = []
    for name, (ours, reference) in jobs.items():
        times = alternate(ours, reference, rounds=rounds)
        ratio = statistics.median(times[1]) / statistics.median(times[0])
        found.append(
            {"what": name, **summary(times[0]), "peer": "numpy", "peer_ms": statistics.median(times[1]) * 1e3, "ratio": ratio}
        )
        print(f"{name:14} {found[-1]['ms']:8.3f} ms  {ratio:6.1f} x numpy", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    rounds, tokens = (4, [1, 16]) if options.quick else (12, [1, 2, 4, 8, 16, 64, 256])
    rows: list[dict[str, Any]] = []
    for format in ("bf16", "int4") if options.quick else FORMATS:
        rows += feed_forward(format, tokens, rounds)
    rows += others(rounds)
    if options.output:
        facts = {"machine": machine(), "cores": native.cores(), "level": native.level(), "date": str(date.today())}
        temporary = options.output.with_suffix(".partial")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(options.output)


if __name__ == "__main__":
    main()
