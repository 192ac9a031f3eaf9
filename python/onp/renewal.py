"""Does anything still get through the best mask? Probes renewed against it."""

from __future__ import annotations

from torch import Tensor

from onp.evidence import Evidence
from onp.probes.contenders import getting_through
from onp.probes.probe import OneClass
from onp.probes.race import Contender
from onp.probes.synthesis import synthesise
from onp.scene import Scene


def renew(scene: Scene, evidence: Evidence, mask: Tensor) -> list[Contender]:
    """Contenders of the fresh probes that get through ``mask`` bool [S] and can be pruned away.

    Replayed triggers are not renewed: one that must also reach its class in the pruned network does
    so by natural directions, for networks that are clean by then as well. Nor are those for one
    class's images, which are too few to judge by.
    """
    config, target = scene.config, evidence.verdict.target
    if evidence.verdict.by_norms or isinstance(target, OneClass):
        return []
    images, labels = scene.clean.images, scene.clean.labels
    fresh = synthesise(
        scene.evaluator.network, images, labels, evidence.verdict.targets,
        steps=config.synthesis.renewal_steps, draw=config.synthesis.images_per_step,
        valid=scene.valid, seed=scene.seed + 1, ledger=scene.ledger, gates=(~mask).float(),
    )  # fmt: skip
    rivals = [c for c in evidence.contenders if c.probe.target not in evidence.verdict.targets]
    through = getting_through(fresh, scene.evaluator, mask, images, labels, rivals, config)
    return [c for c in scene.raced(through) if c.score >= config.synthesis.through_worth]
