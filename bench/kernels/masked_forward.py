"""Masked forward: every mask on every image, ours against the ways that users have.

Nothing is shared between masks: baselines are timed on a few and scaled, ours runs all of them
except on the largest networks. ``torch.func.vmap`` alone shares the convolution before the first
mask, among those few. A baseline multiplies by every mask alike: it is checked and timed with the
fewest pruned, and those rows are repeated for more; so are those of forced instruction sets.
"""

from __future__ import annotations

import copy
import io
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.gated import gated, gates_of
from bench.kernels.peak import Ceilings, best_time
from bench.kernels.rows import Row
from bench.zoo.architectures import ARCHITECTURES
from onp import masks
from onp.ops.masked_forward import (
    MaskedForwardPlan,
    bytes_pay,
    halves_pay,
    instruction_sets,
    lower,
)
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask
from onp.suspect.trace import Trace, trace

KERNEL = "masked_forward"
BYTES, HALVES = "onp, 8 bits", "onp, bf16"
NETWORKS: dict[str, tuple[str, float, dict[str, float]]] = {
    "preactresnet18-64": ("preactresnet18", 64, {"fp32": 1.0, "reduced": 1.2}),
    "preactresnet18-16": ("preactresnet18", 16, {"fp32": 1.2, "reduced": 1.3}),
    "resnet20-16": ("resnet20", 16, {"reduced": 1.3}),
    "vgg16_bn-64": ("vgg16_bn", 64, {}),
    "mobilenetv2-1": ("mobilenetv2", 1.0, {"fp32": 1.2, "reduced": 1.3}),
}
"""Architecture, width, and the ratios to the best baseline that are aimed at, by precision."""
OTHERS: dict[str, tuple[str, float, dict[str, float]]] = {
    "densenet-16": ("densenet", 16, {}),
    "convnext-32": ("convnext", 32, {}),
    "vit-64": ("vit", 64, {}),
}
"""With concatenations, layer norms, attention: fewer masks and images, one share."""
LINEAR = "preactresnet18-16, 1% pruned"
"""Case where a baseline runs all masks too: whether time is linear in their number."""
LARGE = 2000.0
"""GFLOP of a case from which on ours, too, is timed on a few masks, and all ways twice at most;"""
LARGEST = 6000.0
"""from which on once: so that the table is done in 20 minutes. Not on a GPU."""
SHARES = (0.01, 0.05, 0.3)
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "reduced": 0.05}
"""Of logits in each precision, relative to the largest."""
FEW = 4
"""Masks that are timed where not all are."""
CLASSES = 10

Run = Callable[[Tensor], Tensor]
"""bool [B, S] to logits [B, N, K]."""


@dataclass(frozen=True)
class Case:
    """A network, images and masks."""

    name: str
    model: nn.Module
    trace: Trace
    network: fx.GraphModule
    """With masks as inputs."""
    images: Tensor
    pruned: Tensor
    """bool [B, S]."""
    gflop: float
    """Of all masks on all images, direct convolutions; pruned channels too, though ours leaves some
    out."""
    targets: Mapping[str, float]
    """By precision."""

    @cached_property
    def expected(self) -> Tensor:
        """Logits of the first two masks on a few images, float32 [2, n, K], in double precision."""
        network = gated(copy.deepcopy(self.model).double(), self.trace)
        images = self.images[:16].double()
        with torch.no_grad():
            return torch.stack(
                [network(images, g) for g in gates_of(self.pruned[:2]).double()]
            ).float()


def cases(network: str, count: int, images: int, shares: tuple[float, ...]) -> Iterator[Case]:
    """One a share of pruned sites, with masks that are independent of each other."""
    arch, width, targets = (NETWORKS | OTHERS)[network]
    torch.manual_seed(0)
    model = settled(ARCHITECTURES[arch](width, CLASSES))
    traced = trace(model, (3, 32, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    gflop = counter.get_total_flops() * count * images / 1e9
    case = Case(
        network, model, traced, gated(model, traced), torch.rand(images, 3, 32, 32),
        torch.zeros(count, traced.sites, dtype=torch.bool), gflop, targets,
    )  # fmt: skip
    for share in shares:
        pruned = torch.rand(count, traced.sites) < share
        yield replace(case, name=f"{network}, {100 * share:g}% pruned", pruned=pruned)


def settled(model: nn.Module) -> nn.Module:
    """Running statistics that fit the weights, so that logits are of ordinary size."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.rand(64, 3, 32, 32))
    return model.eval()


@dataclass(frozen=True)
class Way:
    """An implementation."""

    name: str
    precision: str
    make: Callable[[Case], Run]
    every_mask: bool = False
    """Whether it is timed on all masks, unless the network is large."""
    depends: bool = False
    """Whether it is run at every share of pruned sites, and not only at the smallest."""
    forced: bool = False
    """Whether it is one of ours that is only shown."""
    emulated: bool = False
    """Whether the processor has no instructions for its precision: its time would say nothing of
    processors that have. Left out."""


def _loop(network: Callable[..., Tensor], images: Tensor, dtype: torch.dtype) -> Run:
    """A forward a mask."""

    def run(pruned: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.stack([network(images, g) for g in gates_of(pruned).to(dtype)]).float()

    return run


def eager(
    layout: torch.memory_format, dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> Callable[[Case], Run]:
    """Torch as it is, or compiled."""

    def make(case: Case) -> Run:
        network = gated(copy.deepcopy(case.model), case.trace).to(dtype, memory_format=layout)
        call = torch.compile(network) if compiled else network
        return _loop(call, case.images.to(dtype).contiguous(memory_format=layout), dtype)

    return make


def vmapped(case: Case) -> Run:
    """All masks at once by torch.func."""
    call = torch.func.vmap(lambda g: case.network(case.images, g))

    def run(pruned: Tensor) -> Tensor:
        with torch.no_grad():
            return call(gates_of(pruned))

    return run


def folded(case: Case) -> Run:
    """Torch with norms folded into the convolutions, channels last."""
    return _loop(FrozenNetwork(case.trace, case.model, native=False), case.images, torch.float32)


def edited(layout: torch.memory_format) -> Callable[[Case], Run]:
    """Weights edited for every mask, then one pass: what benchmark suites do."""

    def make(case: Case) -> Run:
        model = copy.deepcopy(case.model).to(memory_format=layout)
        images = case.images.contiguous(memory_format=layout)

        def run(pruned: Tensor) -> Tensor:
            with torch.inference_mode():
                return torch.stack(
                    [apply_mask(model, case.trace, mask)(images) for mask in pruned.cpu()]
                )

        return run

    return make


def onnx_runtime(case: Case) -> Run:
    """ONNX Runtime, masks as an input."""
    import onnxruntime

    file = io.BytesIO()
    inputs = (case.images, torch.ones(case.trace.sites))
    torch.onnx.export(
        case.network, inputs, file, dynamo=False, input_names=["images", "gates"],
        output_names=["logits"],
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    images = case.images.numpy()

    def run(pruned: Tensor) -> Tensor:
        found = [
            session.run(None, {"images": images, "gates": g.numpy()})[0] for g in gates_of(pruned)
        ]
        return torch.from_numpy(np.stack(found))

    return run


def openvino(precision: str) -> Callable[[Case], Run]:
    """OpenVINO, masks as an input."""

    def make(case: Case) -> Run:
        import openvino as ov

        inputs = (case.images, torch.ones(case.trace.sites))
        model = ov.convert_model(
            torch.jit.trace(case.network, inputs), example_input=inputs,
            input=[tuple(one.shape) for one in inputs],
        )  # fmt: skip
        compiled = ov.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        images = case.images.numpy()

        def run(pruned: Tensor) -> Tensor:
            found = [compiled((images, g.numpy()))[0].copy() for g in gates_of(pruned)]
            return torch.from_numpy(np.stack(found))

        return run

    return make


def ours(isa: str | None = None) -> Callable[[Case], Run]:
    """The native engine; ``isa`` forces an instruction set."""

    def make(case: Case) -> Run:
        plan = lower(case.trace, case.model)
        forced = {} if isa is None else {"isa": isa}

        def run(pruned: Tensor) -> Tensor:
            return plan.run(masks.pack(pruned), case.images, share=False, **forced)

        return run

    return make


def in_bytes(case: Case) -> MaskedForwardPlan:
    """The native engine's plan in 8 bits, its ranges those of no mask and the last one on the
    last images: the first are checked."""
    plan = lower(case.trace, case.model)
    some = torch.stack([torch.zeros_like(case.pruned[0]), case.pruned[-1]])
    ranges = plan.measure_ranges(masks.pack(some), case.images[-32:])
    return lower(case.trace, case.model, ranges)


def in_halves(case: Case) -> MaskedForwardPlan:
    """The native engine's plan in bf16."""
    return lower(case.trace, case.model, halves=True)


def rough(plan_of: Callable[[Case], MaskedForwardPlan]) -> Callable[[Case], Run]:
    """The native engine as it may search."""

    def make(case: Case) -> Run:
        plan = plan_of(case)
        return lambda pruned: plan.run(masks.pack(pruned), case.images, share=False)

    return make


ROUGH = {
    **({BYTES: in_bytes} if bytes_pay() else {}),
    **({HALVES: in_halves} if halves_pay() else {}),
}
"""What a search may be told instead of fp32, where this processor has instructions for it."""


_X86 = platform.machine() in ("x86_64", "AMD64")
BF16 = (
    torch.cpu._is_avx512_bf16_supported() if _X86 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether the processor multiplies bf16; emulated, a pass takes up to five times that of fp32."""
LAST, FIRST = torch.channels_last, torch.contiguous_format
WAYS = [
    Way("onp", "fp32", ours(), every_mask=True, depends=True),
    *(Way(n, "reduced", rough(plan), every_mask=True, depends=True) for n, plan in ROUGH.items()),
    *(
        Way(f"onp, {isa}", "fp32", ours(isa), forced=True)
        for isa in ("avx2", "generic")
        if isa in instruction_sets()[1:]
    ),
    Way("torch eager, NCHW", "fp32", eager(FIRST)),
    Way("torch eager, channels last", "fp32", eager(LAST)),
    Way("torch.compile", "fp32", eager(LAST, compiled=True)),
    Way("torch.func.vmap", "fp32", vmapped),
    Way("torch eager, norms folded", "fp32", folded),
    Way("weights edited, NCHW", "fp32", edited(FIRST)),
    Way("weights edited, channels last", "fp32", edited(LAST)),
    Way("ONNX Runtime", "fp32", onnx_runtime),
    Way("OpenVINO", "fp32", openvino("f32")),
    Way("torch eager, bf16", "reduced", eager(LAST, torch.bfloat16), emulated=not BF16),
    Way(
        "torch.compile, bf16",
        "reduced",
        eager(LAST, torch.bfloat16, compiled=True),
        emulated=not BF16,
    ),
    Way("OpenVINO, bf16", "reduced", openvino("bf16"), emulated=not BF16),
]


def measure(case: Case, way: Way, repeats: int, peak: float | None) -> Row:
    """One row: the correctness gate first; seconds of all masks on all images. ``peak``: GFLOP/s in
    the way's precision."""
    row = Row(KERNEL, case.name, way.name, way.precision, None, False)
    if way.emulated:
        return replace(row, note="left out: this processor has no instructions for it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = way.make(case)
            found = run(case.pruned[:2])[:, : len(case.expected[0])]
    except Exception as error:
        return replace(row, note=f"did not run: {type(error).__name__}: {error}"[:200])
    scale = float(case.expected.abs().max())
    off = float((found - case.expected).abs().max()) / scale
    tolerance = TOLERANCES[way.precision]
    if not off < tolerance:
        return replace(row, note=f"off by {off:.2g} of the largest logit")
    large = case.gflop >= LARGE and not case.pruned.is_cuda
    whole = way.every_mask and not large
    some = case.pruned if whole else case.pruned[:FEW]
    often = min(repeats, 1 if case.gflop >= LARGEST else 2) if large else repeats
    seconds = best_time(lambda: run(some), often) * len(case.pruned) / len(some)
    main = way.precision if way.name in ("onp", *ROUGH) else ""
    return replace(
        row,
        seconds=seconds,
        correct=True,
        share_of_peak=None if peak is None else round(case.gflop / seconds / peak, 3),
        target=case.targets.get(main),
        forced=way.forced,
        note="" if whole else f"timed on {len(some)} masks",
    )


def peak_of(way: Way, ceilings: Ceilings) -> float | None:
    """What the machine can do in the way's arithmetic, in GFLOP/s."""
    return ceilings.int8_gops if way.name == BYTES else ceilings.gflops(way.precision)


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every implementation on every case."""
    count, images = (8, 64) if quick else (64, 256)
    for network in NETWORKS:
        known: dict[str, Row] = {}
        for case in cases(network, count, images, SHARES[:1] if quick else SHARES):
            ways = WAYS
            if case.name == LINEAR:
                every = eager(LAST)
                ways = [*WAYS, Way("torch eager, channels last, all", "fp32", every, True)]
            for way in ways:
                print(f"{case.name}: {way.name}", file=sys.stderr, flush=True)
                if way.name in known:
                    yield replace(known[way.name], case=case.name)
                    continue
                row = measure(case, way, repeats, peak_of(way, ceilings))
                if not way.depends:
                    known[way.name] = replace(row, note=f"{row.note}, of {case.name}")
                yield row


def others(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every implementation on the networks that are more than convolutions."""
    count, images = (8, 64) if quick else (16, 128)
    for network in OTHERS:
        for case in cases(network, count, images, SHARES[:1]):
            for way in WAYS:
                print(f"{case.name}: {way.name}", file=sys.stderr, flush=True)
                yield measure(case, way, repeats, peak_of(way, ceilings))
