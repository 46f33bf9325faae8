"""moestro's engine, its memory budget the same as the kernel's limit. See session.py.

Options: of Engine.open, such as store; `plan` is the file of a plan, which then says memory and context. Unless trace is false, how
much the routing repeats is told.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import session


class Moestro:
    def __init__(self, spec: dict[str, Any]) -> None:
        from moestro.engine.engine import Engine

        self.context = spec["context"]
        options = dict(spec["options"])
        if file := options.pop("plan", None):
            from moestro.core.plan import read_plan

            options["plan"] = read_plan(file)
        else:
            options |= {"memory": spec["memory"], "context": self.context}
        self.engine = Engine.open(spec["model"], threads=spec["threads"], **{"trace": True, **options})

    def start(self) -> None:
        self.engine.begin()
        self.state = self.engine.trunk.start(1, self.context)
        self.started = False

    def feed(self, tokens: list[int]) -> int:
        import numpy as np

        logits_BV = (self.engine.decode if self.started else self.engine.prefill)(np.array([tokens], np.int64), self.state)
        self.started = True
        return int(logits_BV[0].argmax())

    def stats(self) -> dict[str, Any]:
        table, cache = self.engine.cache.table, self.engine.cache
        both = [table.counts(prefill=flag) for flag in (True, False)]
        out = {name: sum(getattr(c, name) for c in both) for name in ("hits", "misses", "prefetch_issued", "prefetch_used")}
        return out | {
            "bytes_asked": sum(cache.bytes_read(prefill=flag) for flag in (True, False)),
            "reader_bytes": self.engine.reader.bytes_read,
            "reader_seconds": self.engine.reader.seconds_busy,
        }

    def about(self) -> dict[str, Any]:
        from moestro.kernels import native

        plan = self.engine.plan
        forecast = asdict(plan.forecast) if plan.forecast else None
        return {
            "kernels": native.level(),
            "expert_bytes": self.engine.store.slot_bytes,
            "memory": asdict(plan.memory),
            "slots": list(plan.slots),
            "scope": plan.scope,
            "eviction": plan.eviction,
            "predictor": plan.predictor,
            "prefetch": plan.prefetch,
            "trunk": type(self.engine.trunk).__name__,
            "forecast": forecast,
            "overlap": None if self.engine.recorder is None else self._overlap(),
            "exact": not self.engine.changes,
            "changes": list(self.engine.changes),
        }

    def _overlap(self) -> float:
        """Share of a token's experts that the token before it used in the same layer; mean over tokens and layers."""
        experts_LTK = self.engine.trace().experts_LTK
        same = (experts_LTK[:, 1:, :, None] == experts_LTK[:, :-1, None, :]).any(-1)
        return float(same.mean())


if __name__ == "__main__":
    raise SystemExit(session.main(Moestro))
