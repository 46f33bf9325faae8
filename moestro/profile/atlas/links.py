"""Links: the strongest few relations of each expert, out of tables of pairs that would be too large to show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.profile.measures.redundancy import cka
from moestro.profile.profile import Profile

MOST = 8


@dataclass(frozen=True, slots=True)
class Links:
    """The `MOST` strongest of each expert, strongest first. experts_LEN: whom, -1 for none; values_LEN: the statistic itself.

    about: what the numbers are.
    """

    name: str
    about: str
    experts_LEN: np.ndarray
    values_LEN: np.ndarray


def links(profile: Profile) -> list[Links]:
    """Chosen together, similar, next and previous layer; those that the profile has statistics for."""
    arrays, out = profile.arrays, []
    experts = int(profile.experts_L.max())
    others_EE = ~np.eye(experts, dtype=bool)
    if "together_LEE" in arrays:
        together_LEE = np.where(others_EE[None], arrays["together_LEE"], 0)
        out.append(_strongest("together", "tokens that chose both", together_LEE, together_LEE > 0))
    if "hsic_LEE" in arrays:
        cka_LEE = np.stack([_padded(cka(h[:e, :e]), experts) for h, e in zip(arrays["hsic_LEE"], profile.experts_L.tolist())])
        inside_LE = np.arange(experts)[None, :] < profile.experts_L[:, None]
        out.append(
            _strongest("similar", "CKA of the outputs", cka_LEE, others_EE[None] & inside_LE[:, None] & inside_LE[:, :, None])
        )
    if len(arrays.get("next_LEE", ())):
        next_LEE = arrays["next_LEE"]
        out.append(_strongest("next", "tokens of both, the second in the next MoE layer", next_LEE, next_LEE > 0))
        before_LEE = next_LEE.transpose(0, 2, 1)
        out.append(_strongest("before", "tokens of both, the second in the MoE layer before", before_LEE, before_LEE > 0))
    if len(arrays.get("next_first_LEE", ())):
        first_LEE = arrays["next_first_LEE"]
        out.append(_strongest("flow", "tokens, by their heaviest expert in each of the two layers", first_LEE, first_LEE > 0))
    return out


def _padded(table_EE: np.ndarray, experts: int) -> np.ndarray:
    out = np.zeros((experts, experts))
    out[: len(table_EE), : len(table_EE)] = table_EE
    return out


def _strongest(name: str, about: str, table_LEE: np.ndarray, counts_LEE: np.ndarray) -> Links:
    """counts_LEE: where a pair may be named."""
    most = min(MOST, table_LEE.shape[2])
    kept_LEE = np.where(counts_LEE, table_LEE, -np.inf)
    order_LEN = np.argsort(-kept_LEE, axis=2, kind="stable")[:, :, :most]
    there_LEN = np.isfinite(np.take_along_axis(kept_LEE, order_LEN, axis=2))
    values_LEN = np.where(there_LEN, np.take_along_axis(table_LEE, order_LEN, axis=2), 0)
    return Links(name, about, np.where(there_LEN, order_LEN, -1), values_LEN)
