"""FT: fine-tuning of all weights on clean images (BackdoorBench's baseline)."""

from __future__ import annotations

from torch import nn

from bench.defences.api import Info, defence
from bench.defences.finetuning import finetune, schedule_text
from onp.data import ImageSet
from onp.ledger import Ledger

PUBLISHED_EPOCHS = 100
"""BackdoorBench, ``ft``: 100 epochs, SGD, learning rate 0.01, cosine."""
EPOCHS = 40


@defence("ft")
def fine_tuning(
    model: nn.Module, clean: ImageSet, *, seed: int, ledger: Ledger, epochs: int = EPOCHS
) -> tuple[nn.Module, Info]:
    """Fine-tune all weights on the cross entropy."""
    tuned = finetune(model, clean, epochs=epochs, seed=seed, ledger=ledger)
    return tuned, Info(schedule=schedule_text(epochs, PUBLISHED_EPOCHS, clean))
