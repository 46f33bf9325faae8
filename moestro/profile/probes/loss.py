"""Loss: how well the model predicts the text, by label.

Paper      none
Idea       Statistics of a model that does not understand the text say little; and the sum in nats over characters is a quality measure.
Rule       nats[g] = sum over counted tokens of label g, save the first of a sequence, of -log p(token | the tokens before it in its sequence)
Needs      the model's logits, which every runner gives
Gives      nats_G, predicted_G
Departs    nothing
Checked    against torch's cross-entropy; uniform logits give log V; each token is predicted at most once whatever the stride
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer, as_numpy
from moestro.profile.statistics import Count, Sum

ROWS = 128  # tokens whose logits are worked on at a time


@method("profile.probes.loss", kind="probe", fidelity="exact")
class Loss:
    """Negative log-likelihood per label, in nats."""

    gives = ("nats_G", "predicted_G")

    def start(self, setting: Setting) -> Statistics:
        return {"nats_G": Sum(len(setting.labels)), "predicted_G": Count(len(setting.labels))}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        if layer.ordinal:
            return
        target = np.flatnonzero(seen.counted)
        label_n = seen.labels_T[target > 0]
        target = target[target > 0]
        nats_n = np.zeros(len(target))
        for at in range(0, len(target), ROWS):
            rows = target[at : at + ROWS]
            logits_nV = as_numpy(seen.logits_TV[rows - 1])
            top_n1 = logits_nV.max(1, keepdims=True)
            wanted_n = logits_nV[np.arange(len(rows)), seen.text[rows]].astype(np.float64)
            sum_n = np.exp(logits_nV - top_n1).sum(
                1, dtype=np.float64
            )  # the exponentials in float32: 1e-7 of a nat, four times as fast
            nats_n[at : at + ROWS] = np.log(sum_n) + top_n1[:, 0] - wanted_n
        labels = len(statistics["nats_G"].value())
        statistics["nats_G"].add(slice(None), np.bincount(label_n, nats_n, labels))
        statistics["predicted_G"].add(slice(None), np.bincount(label_n, minlength=labels))
