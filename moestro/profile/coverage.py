"""Which experts a profile knows too little of: never seen, or on so few tokens that their statistics mean little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.profile.profile import Profile

FEW = 32  # tokens


@dataclass(frozen=True, slots=True)
class Coverage:
    """Per layer the experts that were never chosen, and those chosen on fewer than `few` tokens. experts: of all layers."""

    never: tuple[tuple[int, ...], ...]
    rarely: tuple[tuple[int, ...], ...]
    experts: int
    few: int

    @property
    def unseen(self) -> int:
        return sum(map(len, self.never))

    def told(self) -> list[str]:
        """Lines for people; none when every expert was seen often enough."""
        out = []
        for what, found in (("never chosen", self.never), (f"chosen on fewer than {self.few} tokens", self.rarely)):
            if total := sum(map(len, found)):
                out.append(f"{total} of {self.experts} experts {what}:")
                out += [f"  layer {layer}: {_listed(experts)}" for layer, experts in enumerate(found) if experts]
        return out

    def to_json(self) -> dict[str, object]:
        return {
            "experts": self.experts,
            "few": self.few,
            "never": list(map(list, self.never)),
            "rarely": list(map(list, self.rarely)),
        }


def coverage(profile: Profile, few: int = FEW) -> Coverage:
    """From a profile with the probe counts. Raises ProfileError without it."""
    counts_LE = profile.need("counts", "counts_LE")
    never, rarely = [], []
    for counts_E, experts in zip(counts_LE, profile.experts_L.tolist(), strict=True):
        never.append(tuple(np.flatnonzero(counts_E[:experts] == 0).tolist()))
        rarely.append(tuple(np.flatnonzero((counts_E[:experts] > 0) & (counts_E[:experts] < few)).tolist()))
    return Coverage(tuple(never), tuple(rarely), int(profile.experts_L.sum()), few)


def _listed(experts: tuple[int, ...], most: int = 24) -> str:
    return ", ".join(map(str, experts[:most])) + (f" and {len(experts) - most} more" if len(experts) > most else "")
