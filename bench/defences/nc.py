"""NC: Neural Cleanse with unlearning (Wang et al., IEEE S&P 2019).

For every class, the smallest patch that sends clean images to it is sought; a class whose patch is
an outlier in size is taken for the target, and its patch is unlearned. All classes are optimised
together, in one call of the network a step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.defences.api import Info, defence
from bench.defences.common import ACTIVATION_GRADIENTS, FORWARD, device_of
from bench.defences.finetuning import Step, cross_entropy_step, finetune, schedule_text
from onp.data import ImageSet
from onp.ledger import Ledger

LEARNING_RATE = 0.1
ADAM_BETAS = (0.5, 0.9)
FIRST_PRICE = 1e-3
RAISE, LOWER = 2.0, 2.0**1.5
PATIENCE = 5
"""Steps in a row above or below SUCCESS before the price of the mask's L1 norm changes."""
SUCCESS = 0.98
"""Share of images that a patch has to send to its class."""
JUDGED = 40
"""Images, over at least PATIENCE steps, that a patch is judged on before it is kept."""
ANOMALY = 2.0
"""Index above which a class is flagged: the paper, section IV-A. The others: BackdoorBench's
``nc`` and the authors' code."""
STAMPED = 0.2
"""Share of the images that carry the patch while it is unlearned: the paper, section VI-C."""
CONSISTENT_MAD = 1.4826
"""Makes the median absolute deviation estimate a normal's standard deviation."""

PUBLISHED_STEPS = 800
PUBLISHED_IMAGES = 256
"""80 epochs of 10 batches of 256: BackdoorBench's ``nc`` on 2,500 images."""
STEPS = 200
SEARCH_FORWARDS = 80_000
"""Bound on the search's image-forwards; it sets the images that a step shows to each class."""
MIN_IMAGES, MAX_IMAGES = 4, 32
PUBLISHED_EPOCHS = 100
EPOCHS = 12


@dataclass(frozen=True)
class Patches:
    """The smallest patch found for every class."""

    masks: Tensor
    """float32 [K, 1, H, W] in [0, 1]."""
    patterns: Tensor
    """float32 [K, C, H, W] in [0, 1]."""
    sizes: Tensor
    """float32 [K]: the masks' L1 norms; NaN for classes without a patch."""

    def stamp(self, images: Tensor, classes: Tensor) -> Tensor:
        """Images [N, C, H, W] with the patches of classes int64 [N]."""
        mask, pattern = self.masks[classes], self.patterns[classes]
        return images + mask * (pattern - images)


@defence("nc")
def neural_cleanse(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    steps: int = STEPS,
    search_forwards: int = SEARCH_FORWARDS,
    anomaly: float = ANOMALY,
    epochs: int = EPOCHS,
) -> tuple[nn.Module, Info]:
    """Find patches, flag outliers, unlearn them; without an outlier the network is unchanged.

    Where several classes are flagged, the stamped images carry their patches in turn, the smallest
    first.
    """
    patches, shown = search(
        model, clean, steps=steps, image_forwards=search_forwards, seed=seed, ledger=ledger
    )
    indices = anomaly_indices(patches.sizes)
    flagged = flagged_classes(patches.sizes, anomaly)
    schedule = (
        f"search: {steps} of {PUBLISHED_STEPS} updates, each on {shown} of {PUBLISHED_IMAGES} "
        "images a class"
    )
    settings = {
        "sizes": _without_nan(patches.sizes),
        "anomaly_indices": _without_nan(indices),
        "flagged": flagged,
    }
    if not flagged:
        return copy.deepcopy(model).eval(), Info(schedule=schedule, settings=settings)
    step = unlearning_step(patches, flagged, seed)
    tuned = finetune(model, clean, epochs=epochs, seed=seed, ledger=ledger, step=step)
    schedule += f"; unlearning: {schedule_text(epochs, PUBLISHED_EPOCHS, clean)}"
    return tuned, Info(schedule=schedule, settings=settings)


def search(
    model: nn.Module,
    clean: ImageSet,
    *,
    steps: int,
    image_forwards: int,
    seed: int,
    ledger: Ledger,
) -> tuple[Patches, int]:
    """Optimise a mask and a pattern for every class, and tell how many images a step showed.

    Each step puts the patches of all K classes on the same B images. The loss is the cross entropy
    towards the patch's class plus a price on the mask's L1 norm; a class's price rises while its
    patch succeeds and falls while it does not. Kept is the smallest mask of a class
    that succeeded on the last JUDGED images or more.
    """
    random = torch.Generator().manual_seed(seed)
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    device = device_of(frozen)
    images = clean.floats()
    channels, height, width = images.shape[1:]
    with torch.no_grad():
        classes = frozen(images[:1].to(device)).shape[1]
    ledger.count(FORWARD)
    shown = image_forwards // (ACTIVATION_GRADIENTS * classes * max(steps, 1))
    shown = min(max(shown, MIN_IMAGES), MAX_IMAGES, len(clean))

    raw_mask = _arctanh_uniform((classes, 1, height, width), random).to(device)
    raw_pattern = _arctanh_uniform((classes, channels, height, width), random).to(device)
    optimizer = torch.optim.Adam(
        [raw_mask.requires_grad_(True), raw_pattern.requires_grad_(True)],
        LEARNING_RATE,
        betas=ADAM_BETAS,
    )
    wanted = torch.arange(classes, device=device)
    best = _Best(_unit(raw_mask).detach(), _unit(raw_pattern).detach())
    price = torch.full((classes,), FIRST_PRICE, device=device)
    window = max(PATIENCE, ceil(JUDGED / shown))
    recent = torch.zeros(window, classes, device=device)  # success of the last steps
    above, below = torch.zeros(2, classes, device=device)  # steps in a row
    for step in range(steps):
        index = torch.randperm(len(clean), generator=random)[:shown]
        x = images[index].to(device)
        mask, pattern = _unit(raw_mask), _unit(raw_pattern)
        stamped = x + mask[:, None] * (pattern[:, None] - x)  # [K, B, C, H, W]
        logits = frozen(stamped.flatten(0, 1)).view(classes, shown, -1)
        ledger.count(ACTIVATION_GRADIENTS * classes * shown)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(shown)) * classes
        norms = mask.flatten(1).sum(1)  # [K]
        optimizer.zero_grad()
        (loss + (price * norms).sum()).backward()
        with torch.no_grad():
            success = (logits.argmax(2) == wanted[:, None]).float().mean(1)  # [K]
            recent[step % window] = success
            best.keep(mask, pattern, norms, recent.mean(0) >= SUCCESS)
            good = success >= SUCCESS
            above, below = (above + 1) * good, (below + 1) * ~good
            price = torch.where(above >= PATIENCE, price * RAISE, price)
            price = torch.where(below >= PATIENCE, price / LOWER, price)
            above, below = above * (above < PATIENCE), below * (below < PATIENCE)
        optimizer.step()
        ledger.tick(step + 1, steps, "patches of all classes")
    return best.patches(), shown


class _Best:
    """The smallest successful patch of every class so far."""

    def __init__(self, masks: Tensor, patterns: Tensor) -> None:
        self._masks, self._patterns = masks.clone(), patterns.clone()
        self._sizes = torch.full((len(masks),), torch.nan, device=masks.device)

    def keep(self, masks: Tensor, patterns: Tensor, sizes: Tensor, succeeded: Tensor) -> None:
        better = succeeded & ~(sizes >= self._sizes)  # NaN: the first that succeeds
        self._masks[better], self._patterns[better] = masks[better], patterns[better]
        self._sizes[better] = sizes[better]

    def patches(self) -> Patches:
        return Patches(self._masks, self._patterns, self._sizes)


def _unit(raw: Tensor) -> Tensor:
    """Any number to [0, 1]."""
    return raw.tanh() / 2 + 0.5


def _arctanh_uniform(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """What ``_unit`` maps to uniform values."""
    return ((torch.rand(shape, generator=random) - 0.5) * 1.998).atanh()


def anomaly_indices(sizes: Tensor) -> Tensor:
    """float32 [K]: distances of sizes [K] from their median, in robust standard deviations.

    Section IV-A; signed, so that classes of a patch below the median have negative indices. A class
    without a patch (NaN) has none and counts for nothing. Where fewer than half of the classes have
    one, or half of those agree, nothing can stand out: all are NaN.
    """
    found = sizes[~sizes.isnan()]
    if 2 * len(found) < len(sizes) or len(found) == 0:
        return torch.full_like(sizes, torch.nan)
    spread = _median((found - _median(found)).abs())
    if float(spread) == 0:
        return torch.full_like(sizes, torch.nan)
    return (sizes - _median(found)) / (CONSISTENT_MAD * spread)


def flagged_classes(sizes: Tensor, anomaly: float = ANOMALY) -> list[int]:
    """The classes whose patches are outliers on the small side, smallest first."""
    outliers = (anomaly_indices(sizes) < -anomaly).nonzero().squeeze(1)
    return outliers[sizes[outliers].argsort()].tolist()


def _without_nan(values: Tensor) -> list[float | None]:
    """For the settings: NaN as None."""
    return [None if value != value else round(value, 2) for value in values.tolist()]


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle values where their number is even."""
    return values.double().quantile(0.5).float()


def unlearning_step(patches: Patches, flagged: list[int], seed: int) -> Step:
    """A fine-tuning update in which a share of the images carry flagged patches, with their own
    labels."""
    random = torch.Generator().manual_seed(seed)

    def step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> int:
        chosen = torch.randperm(len(images), generator=random)[: round(STAMPED * len(images))]
        turn = torch.arange(len(chosen)) % len(flagged)
        images[chosen] = patches.stamp(images[chosen], torch.tensor(flagged)[turn])
        return cross_entropy_step(model, optimizer, images, labels)

    return step
