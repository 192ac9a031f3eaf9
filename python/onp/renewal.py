"""Does anything still get through the best mask? Probes renewed against it.

A replayed trigger still has to explain what the norms remember of the network as it came, but must
reach its class in the pruned one. Without such statistics every family is synthesised again.
"""

from __future__ import annotations

from torch import Tensor

from onp.agent.contenders import getting_through, success_of
from onp.agent.race import Contender
from onp.evidence import Evidence, Scene
from onp.probes.norm_shift import NormShift
from onp.probes.synthesis import synthesise


def renew(
    scene: Scene, evidence: Evidence, shift: NormShift | None, mask: Tensor
) -> list[Contender]:
    """Contenders of the fresh probes that get through ``mask`` bool [S] and can be pruned away."""
    config, target = scene.config, evidence.verdict.target
    assert target is not None
    if evidence.verdict.by == "norm statistics":
        assert shift is not None
        last = evidence.counted[0].probe
        fresh = [scene.replayed(shift, against=(last, (~mask).float())).probe]
        count = min(config.race.second_images, len(scene.images))
        through = [
            probe
            for probe in fresh
            if success_of(probe, scene.evaluator, mask, scene.images[:count], scene.labels[:count])
            >= config.replay.through_success
        ]
    else:
        fresh = synthesise(
            scene.evaluator.network, scene.images, scene.labels, [target],
            steps=config.synthesis.renewal_steps, draw=config.synthesis.images_per_step,
            valid=scene.valid, seed=scene.seed + 1, ledger=scene.ledger, gates=(~mask).float(),
        )  # fmt: skip
        through = getting_through(
            fresh, scene.evaluator, mask, scene.images, scene.labels, evidence.contenders, config
        )
    return [c for c in scene.raced(through) if c.score >= config.synthesis.through_worth]
