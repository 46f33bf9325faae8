"""Does GPTQ beat rounding to nearest, what do four bits cost, and do mixed bits beat uniform ones at equal bytes?

    python benchmarks/bits.py --data TEXT [--model FOLDER] [--seeds 3] [--tokens 4096] [--only gptq-int4:64 ...]

The embedded model by default. TEXT's first tokens are held out for judging; each seed calibrates on another part of the rest. What the
methods make is judged in memory: the same numbers as in the files they write, multiplied in float32. Bits count scales and minimums.
"3 bits minus size" is uniform three bits with as many experts removed, the least used first, as bring it to the bytes of 2.5 bits.
A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import Cells, default_work, say, spread

from moestro.core.layer import RunnerOutput
from moestro.core.plans.compression import CompressionPlan
from moestro.models.open import Model
from moestro.profile.profile import Profile

AVERAGE = 2.5
WIDTHS = ("int2:128", "int3:128", "int4:128")
SINGLE = ("int4:64", "uint4:64", "int3:64", "int2:32")
CONTENDERS: dict[str, dict[str, Any]] = {
    **{f"rtn-{codec}": {"method": "rtn", "codecs": (codec,)} for codec in SINGLE},
    "rtn-uint4:64-search": {"method": "rtn", "codecs": ("uint4:64",), "options": {"search": True}},
    **{f"gptq-{codec}": {"method": "gptq", "codecs": (codec,)} for codec in SINGLE},
    "rtn-uint4:64-eaquant": {"method": "rtn", "codecs": ("uint4:64",), "smooth": "compress.smooth.eaquant"},
    "rtn-int4:64-eaquant": {"method": "rtn", "codecs": ("int4:64",), "smooth": "compress.smooth.eaquant"},
    "gptq-uint4:64-eaquant": {"method": "gptq", "codecs": ("uint4:64",), "smooth": "compress.smooth.eaquant"},
    "gptq-3-bits-minus-size": {"method": "gptq", "codecs": ("int3:128",), "fit": AVERAGE},
    **{
        f"gptq-mixed-{name}-{scope}": {
            "method": "gptq", "codecs": WIDTHS, "bits": AVERAGE, "budget": f"compress.budget.{name}", "budget_options": {"scope": scope},
        }
        for name in ("mc_moe", "mc_sharp")
        for scope in ("layer", "model")
    },
    "gptq-mixed-frequency": {"method": "gptq", "codecs": WIDTHS, "bits": AVERAGE, "budget": "compress.budget.frequency"},
    "gptq-mixed-block_importance": {"method": "gptq", "codecs": WIDTHS, "bits": AVERAGE, "budget": "compress.budget.block_importance"},
}  # fmt: skip


class Read:
    """A live model as `measure` reads it."""

    def __init__(self, model: Model) -> None:
        self.model, self.facts = model, model.facts

    def run(self, tokens_BT: Sequence[Sequence[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        for out in self.model.run([list(row) for row in tokens_BT]):
            yield replace(out, logits_TV=out.logits_TV.float().numpy())


class Known(Read):
    """What a model said of the sequences that are judged, read once."""

    def __init__(self, model: Model, sequences: Sequence[Sequence[int]]) -> None:
        super().__init__(model)
        self.outputs = [replace(out, records=()) for out in super().run(sequences)]

    def run(self, tokens_BT: Sequence[Sequence[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        assert len(tokens_BT) == len(self.outputs)
        return iter(self.outputs)


class Bench:
    """One model, its held-out sequences and the calibration texts of each seed."""

    def __init__(self, folder: Path, data: Path, tokens: int, calibration: int, length: int) -> None:
        from moestro.evaluate.perplexity import cut, measure
        from moestro.models.open import open_model
        from moestro.models.tokenizer import Tokenizer

        self.model = open_model(folder)
        text = data.read_text(encoding="utf-8")
        self.tokenizer, self.length, self.calibration = Tokenizer.open(folder), length, calibration
        held_out, self.text = text[: 8 * tokens], text[8 * tokens :]  # a token is fewer than 8 characters here
        self.sequences = cut(self.tokenizer.encode(held_out, add_special=False)[:tokens], length)
        self.known = Known(self.model, self.sequences)
        self.reference = measure(self.known, self.sequences)
        self.profiles: dict[int, Profile] = {}

    def profile(self, seed: int) -> Profile:
        """Of the seed's own part of the text."""
        from moestro.profile.data import cut
        from moestro.profile.probe import make
        from moestro.profile.run import Recording
        from moestro.profile.sources import Document

        if seed not in self.profiles:
            part = len(self.text) // 8
            document = Document(f"part {seed}", "text", text=self.text[seed * part : (seed + 1) * part])
            texts = cut([document], self.tokenizer, length=self.length, tokens=self.calibration)
            recording = Recording(self.model, texts, make({"inputs": {}, "counts": {}, "residual": {}}))
            recording.run(self.model)
            self.profiles = {seed: recording.profile()}
        return self.profiles[seed]

    def judge(self, contender: str, seed: int) -> dict[str, Any]:
        """Bytes, bits and what it costs on the held-out text."""
        from moestro.compress.bits import matrix_weights
        from moestro.compress.encoding import Encoder
        from moestro.compress.live import compress_live
        from moestro.evaluate.perplexity import measure

        start, profile = time.monotonic(), self.profile(seed)
        plan = planned(self.model, CONTENDERS[contender], profile)
        made = compress_live(plan, self.model, encoder=Encoder(plan, self.model.facts, profile))
        encoded = time.monotonic() - start
        found = measure(Read(made), self.sequences, self.known)
        weights = sum(la.num_experts * matrix_weights(la.spec) for la in self.model.facts.layers)
        return {
            "perplexity": found.perplexity,
            "cost": found.perplexity / self.reference.perplexity - 1,
            "kl": found.kl,
            "bytes": plan.sizes[1],
            "bits": 8 * plan.sizes[1] / weights,
            "experts": plan.experts,
            "stated": list(plan.stated),
            "seconds": {"encode": round(encoded, 1), "judge": round(time.monotonic() - start - encoded, 1)},
        }


def planned(model: Model, said: dict[str, Any], profile: Profile) -> CompressionPlan:
    from moestro.compress.bits import BitsWish, plan_bits

    wish = BitsWish(
        f"compress.encode.{said['method']}",
        said["codecs"],
        said.get("options", {}),
        said.get("bits"),
        said.get("budget", "compress.budget.mc_moe"),
        said.get("budget_options", {}),
        smooth=said.get("smooth", ""),
    )
    base = pruned(model, said["fit"], said["codecs"][0], profile) if "fit" in said else None
    return plan_bits(model.checkpoint, model.layout, wish, profile=profile, base=base).plan


def pruned(model: Model, bits: float, codec: str, profile: Profile) -> CompressionPlan:
    """A plan that keeps the most used experts, as many as fit."""
    from moestro.compress.bits import matrix_weights
    from moestro.compress.evidence import expert_size
    from moestro.compress.planner import Wish, plan_compression

    la = model.facts.layers[0]
    keep = int(la.num_experts * bits * matrix_weights(la.spec) / 8 / expert_size(la.spec, codec))
    return plan_compression(
        "compress.criteria.frequency", model.checkpoint, model.layout, Wish(keep=keep, protect=False), profile=profile
    )


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", type=Path, required=True, help="text, at least eight characters for each token judged or calibrated on"
    )
    p.add_argument("--model", type=Path, help="a folder; by default the embedded model")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--calibration", type=int, default=2048)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    p.add_argument("--work", type=Path, default=default_work())
    p.add_argument("--out", type=Path)
    p.add_argument("--fresh", action="store_true")
    args = p.parse_args(argv)
    from moestro.build.upcycle.default import ensure_default_model

    args.scale = 1
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.model or ensure_default_model()
    settings = {
        "model": folder.name,
        "data": args.data.name,
        **{k: getattr(args, k) for k in ("tokens", "calibration", "length")},
    }
    cells, bench = Cells("bits", args, settings), Bench(folder, args.data, args.tokens, args.calibration, args.length)
    for seed in args.seeds:
        for name in args.only:
            once = seed != args.seeds[0] and CONTENDERS[name]["method"] == "rtn" and "smooth" not in CONTENDERS[name]
            if not once:  # rounding to nearest reads no text
                row = cells.measure(f"{name} seed {seed}", bench.judge, name, seed)
                say(
                    f"{name:32} seed {seed}  {row['bits']:.3f} bits  {100 * row['cost']:+7.2f} %  KL {row['kl']:.4f}  {row['seconds']}"
                )
    summary = []
    for name in CONTENDERS:
        rows = [row for key, row in cells.cells.items() if key.rpartition(" seed ")[0] == name]
        if rows:
            summary.append(
                {
                    "contender": name,
                    "bits": rows[0]["bits"],
                    "cost": spread(row["cost"] for row in rows),
                    "kl": spread(row["kl"] for row in rows),
                }
            )
    cells.write(reference=bench.reference.perplexity, predicted=bench.reference.tokens, summary=summary)
    print(cells.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
