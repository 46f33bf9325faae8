"""PreMoe's task-adaptive retrieval: a pattern and the needed experts of each task, from one profile a task.

Paper      Zhu et al. 2025, arXiv 2505.17639
Idea       A model need not hold every task's experts at once: the first router's answer to a query says which task it is, and its
           experts alone are loaded.
Rule       task-conditioned score of expert e in layer l: see compress.criteria.premoe; pattern = the scores of the first MoE layer; kept = each layer's
           `keep` highest. At run time: the query's pattern by the same rule, the nearest task by L2, its experts alone are open
Needs      selection
Gives      a TaskPlan, which `moestro run --tasks` obeys
Departs    with `positive` (the default) negative logits count 0, see compress.criteria.premoe; the kept ids of later layers are written out,
           where the authors store permutations of the first layer's, which say the same
Checked    keep = E changes nothing; a planted domain's query finds its task and loads its experts alone; another task's experts are worse
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.compress.choosing import choose
from moestro.compress.guard import guarded
from moestro.compress.stats import LayerStats, layer_stats
from moestro.core.errors import InputError, ProfileError
from moestro.core.layer import ModelFacts
from moestro.core.method import load, method
from moestro.core.plan import Subject
from moestro.core.plans.tasks import Task, TaskPlan
from moestro.profile.profile import Profile


@method("compress.retrieval", kind="retrieval", paper="2505.17639", needs=("selection",), fidelity="adapted")
def retrieval(
    profiles: Sequence[tuple[str, Profile]],
    facts: ModelFacts,
    source: str,
    *,
    keep: int,
    positive: bool = True,
    protect: bool = True,
) -> TaskPlan:
    """profiles: (name, profile) of each task. protect: every task keeps the Super Experts of any profile. Raises InputError, ProfileError."""
    score = load("compress.criteria.premoe", "criterion")
    if len(profiles) < 2 or len({name for name, _ in profiles}) < len(profiles):
        raise InputError(f"{len(profiles)} profiles", expected="one for each of two tasks or more, with different names")
    if keep > (most := min(la.num_experts for la in facts.layers)):
        raise InputError(f"a task is to keep {keep} experts of each layer", expected=f"at most {most}")
    always = {key for _, profile in profiles for key in guarded(profile)[0]} if protect else set()
    tasks, made = [], set()
    for name, profile in profiles:
        stats: list[LayerStats] = layer_stats(profile, facts.fingerprint, len(facts.layers))
        scores = [np.asarray(score(s, positive=positive)) for s in stats]
        kept = tuple(
            tuple(choose(score_E, keep, la, [key.expert for key in always if key.layer == la.ordinal]))
            for score_E, la in zip(scores, facts.layers, strict=True)
        )
        tasks.append(Task(name, tuple(float(v) for v in scores[0]), kept))
        said = next((dict(o) for key, o in profile.probes.items() if key.rpartition(".")[2] == "selection"), {})
        made.add((said.get("first", 1), said.get("threshold")))
    if len(made) > 1:
        raise ProfileError(
            "the profiles were made with different options of the probe selection", fix="profile again with the same"
        )
    first, threshold = made.pop()
    plan = TaskPlan(
        subjects=(Subject(source, facts.fingerprint),), method="compress.retrieval", options={"keep": keep, "positive": positive},
        inputs={name: profile.data for name, profile in profiles}, tasks=tuple(tasks), first=first, threshold=threshold,
        positive=positive,
    )  # fmt: skip
    plan.check(facts)
    return plan
