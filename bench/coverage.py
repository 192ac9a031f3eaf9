"""``python -m bench.coverage torchvision``: which networks of a library onp takes.

Each is built with random weights, its norms' statistics from one batch, and traced; then what onp
computes of it is held against the module: logits in torch and in the native engine, and gradients
with respect to the images. One JSON line per network, appended when it is done; lines that are
there are not made again. Neither library is one of onp's own:
``pip install --no-deps torchvision timm huggingface_hub``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.files import append_row, read_rows
from bench.scoreboard.provenance import provenance
from onp import masks
from onp.errors import OnpError, UnsupportedOperation
from onp.ops import masked_forward
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace, trace

MOST_PARAMETERS = 100_000_000
"""Of a network that is computed, too; a larger one is only traced."""
_RESULTS = Path(__file__).parent / "results"

TIMM = (
    "beit_base_patch16_224", "cait_xxs24_224", "coatnet_0_rw_224", "convit_tiny", "convnext_tiny",
    "convnextv2_atto", "crossvit_tiny_240", "cspdarknet53", "darknet53", "deit3_small_patch16_224",
    "deit_tiny_patch16_224", "densenet121", "dpn68", "edgenext_small", "efficientnet_b0",
    "efficientnet_b3", "efficientnetv2_rw_s", "eva02_tiny_patch14_224", "fastvit_t8", "gernet_s",
    "ghostnet_100", "hrnet_w18_small", "inception_v3", "lcnet_100", "legacy_seresnet18",
    "levit_128s", "maxvit_tiny_tf_224", "mixer_b16_224", "mnasnet_100", "mobilenetv2_100",
    "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv4_conv_medium",
    "mobilenetv4_conv_small", "mobilevit_s", "nfnet_f0", "pit_ti_224", "poolformer_s12",
    "regnetx_002", "regnety_002", "repvgg_a0", "res2net50_26w_4s", "resmlp_12_224", "resnest14d",
    "resnet18", "resnet50", "resnetaa50", "resnetv2_50", "resnext50_32x4d", "rexnet_100",
    "semnasnet_100", "seresnet50", "skresnet18", "swin_tiny_patch4_window7_224",
    "tf_efficientnet_b0", "tf_mobilenetv3_small_100", "tinynet_a", "vgg16_bn",
    "visformer_tiny", "vit_base_patch16_224", "vit_tiny_patch16_224", "volo_d1_224",
    "wide_resnet50_2", "xception65", "xcit_nano_12_p16_224",
)  # fmt: skip
"""One or two of each family of timm's; torchvision's are all taken."""

Build = Callable[[], nn.Module]


def networks(library: str) -> dict[str, Build]:
    """Builders of the library's networks, without pretrained weights."""
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise SystemExit(f"{library} is not there: pip install --no-deps {library}") from error
    except RuntimeError:  # torchvision's file for CUDA builds of torch, beside one for CPUs
        _define_missing_operators()
        module = importlib.import_module(library)
    if library == "timm":
        return {name: lambda name=name: module.create_model(name) for name in TIMM}  # type: ignore[misc]
    models = module.models
    found: dict[str, Build] = {}
    for name in models.list_models(module=models):
        known = inspect.signature(models.get_model_builder(name)).parameters
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        assert "weights" in known
        found[name] = lambda name=name, quick=quick: models.get_model(name, weights=None, **quick)  # type: ignore[misc]
    return found


def _define_missing_operators() -> None:
    """What torchvision registers shapes for when it is imported; no classifier calls any of it."""
    boxes = "roi_align roi_pool ps_roi_align ps_roi_pool"
    backward = " ".join(f"_{name}_backward" for name in boxes.split())
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in f"nms qnms {boxes} {backward} deform_conv2d _deform_conv2d_backward".split():
        library.define(f"{name}(Tensor a) -> Tensor")
    library.define("_cuda_version() -> int")
    _KEPT.append(library)
    sys.modules.pop("torchvision", None)


_KEPT: list[torch.library.Library] = []
"""An operator goes when its library does."""


def image_size(library: str, name: str) -> int:
    """Pixels of a side: those that timm's are made for; of torchvision's 96, where that is enough
    and no fixed size."""
    if name == "inception_v3":
        return 299
    if library == "timm":
        return 240 if name.endswith("_240") else 224
    fixed = ("vit", "swin", "vgg", "alexnet")
    return 224 if any(part in name for part in fixed) else 96


@torch.no_grad()
def settle(model: nn.Module, size: int) -> nn.Module:
    """Norms with the statistics of a batch, and no layer of zeros: what a trained network has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.bias.uniform_(-0.1, 0.1)
        elif isinstance(module, nn.Linear) and not bool(module.weight.any()):
            module.weight.normal_(0, 0.02)
    model.train()(torch.rand(4, 3, size, size))
    return model.eval()


def row_of(name: str, build: Build, size: int) -> dict[str, Any]:
    """What onp makes of one network; errors in units of the logits' spread."""
    torch.manual_seed(0)
    model = settle(build(), size)
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"network": name, "size": size, "parameters": parameters}
    started = time.perf_counter()
    try:
        found = trace(model, (3, size, size))
    except OnpError as error:
        return row | {"traced": False, "reason": str(error)}
    row |= {"traced": True, "sites": found.sites}
    row["trace_seconds"] = round(time.perf_counter() - started, 3)
    return row | _compared(model, found, size) if parameters <= MOST_PARAMETERS else row


def _compared(model: nn.Module, found: Trace, size: int) -> dict[str, Any]:
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits: Tensor = model(images)

    def error(got: Tensor) -> float:
        return float(f"{float((got - logits).abs().max() / logits.std()):.1e}")

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = images.clone().requires_grad_(True)
        return torch.autograd.grad((function(leaf) * weights).sum(), leaf)[0]

    plain, frozen = FrozenNetwork(found, model, native=False), FrozenNetwork(found, model)
    with torch.no_grad():
        row: dict[str, Any] = {"error": error(plain(images))}
    try:
        plan = masked_forward.lower(found, model)
        nothing = masks.pack(torch.zeros(1, found.sites, dtype=torch.bool))
        row["native_error"] = error(plan.run(nothing, images, max_bytes=4 << 30)[0])
    except UnsupportedOperation as missing:
        row |= {"native_error": None, "native_lacks": str(missing)}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    pair = [gradient(one).flatten() for one in (frozen, model)]
    row["gradient_cosine"] = round(float(torch.cosine_similarity(*pair, dim=0)), 6)
    return row


def summary(rows: list[dict[str, Any]]) -> str:
    """How many are taken, and the reasons why others are not."""
    taken = [row for row in rows if row["traced"]]
    computed = [row for row in taken if "error" in row]
    native = [row for row in computed if row["native_error"] is not None]
    lines = [
        f"{len(taken)} of {len(rows)} traced; of {len(computed)} that were computed, too, "
        f"{len(native)} by the native engine"
    ]
    if computed:
        worst = max(max(row["error"], row["native_error"] or 0) for row in computed)
        cosine = min(row["gradient_cosine"] for row in computed)
        lines.append(f"largest error {worst:.1e} of the logits' spread, least cosine {cosine:.4f}")
    lines += [f"not {row['network']}: {row['reason']}" for row in rows if not row["traced"]]
    lines += [f"in torch {row['network']}: {row['native_lacks']}" for row in computed
              if row["native_error"] is None]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("library", choices=["torchvision", "timm"])
    parser.add_argument("--networks", nargs="*", help="names; default: all")
    parser.add_argument("--out", type=Path, help="default: bench/results/coverage_LIBRARY.jsonl")
    args = parser.parse_args()
    out = args.out or _RESULTS / f"coverage_{args.library}.jsonl"
    rows = read_rows(out)
    done = {row["network"] for row in rows}
    warnings.filterwarnings("ignore")
    known = networks(args.library)
    for name in args.networks or known:
        if name not in known:
            raise SystemExit(f"{args.library} has no {name}")
        if name in done:
            continue
        rows.append(row_of(name, known[name], image_size(args.library, name)) | provenance())
        append_row(out, rows[-1])
        print(f"{name}: {rows[-1].get('reason', 'traced')}", file=sys.stderr, flush=True)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
