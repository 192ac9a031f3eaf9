"""Both backends of mask evaluation agree, and the choice between them is said."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from onp.config import SearchPrecision
from onp.errors import UnsupportedOperation, UsageError
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.trace import trace
from tests.networks import BUILDERS, hooked_logits, network


@pytest.mark.parametrize("name", BUILDERS)
def test_every_backend_agrees_with_hooks(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(5, traced.sites, generator=random) < 0.03
    images = torch.rand(7, 3, 32, 32, generator=random)
    expected = torch.stack([hooked_logits(model, traced, mask, images) for mask in masks])
    ledger = Ledger()
    backends = ("native", "torch")
    for backend in backends:
        evaluator = MaskEvaluator(traced, model, backend=backend, ledger=ledger)  # type: ignore[arg-type]
        assert evaluator.backend == backend
        torch.testing.assert_close(evaluator.run(masks, images), expected, rtol=0, atol=1e-4)
    assert ledger.total == len(backends) * 5 * 7


class _Big(nn.Module):
    """A convolution with dilation, which the engine lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_what_the_engine_lacks_goes_to_torch_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = _Big().eval()
    traced = trace(model, (3, 8, 8))
    with caplog.at_level(logging.WARNING, "onp"):
        evaluator = MaskEvaluator(traced, model)
    assert evaluator.backend == "torch"
    assert len(caplog.records) == 1
    assert "conv" in caplog.text
    masks = torch.tensor([[False] * 4, [True, False, False, False]])
    images = torch.rand(2, 3, 8, 8)
    expected = torch.stack([hooked_logits(model, traced, mask, images) for mask in masks])
    torch.testing.assert_close(evaluator.run(masks, images), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedOperation):
        MaskEvaluator(traced, model, backend="native")


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize(("precision", "test"), [("int8", "bytes_pay"), ("bf16", "halves_pay")])
def test_calibrated_for_less_than_fp32_where_it_pays_and_used_on_demand(
    precision: SearchPrecision, test: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"onp.ops.masked_forward.{test}", lambda: pays)
    model = network("preactresnet18")
    traced = trace(model, (3, 32, 32))
    evaluator = MaskEvaluator(traced, model)
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(3, traced.sites, generator=random) < 0.03
    images = torch.rand(5, 3, 32, 32, generator=random)
    before = evaluator.run(masks, images)
    assert evaluator.precision == "fp32"
    evaluator.calibrate(precision, masks, images)
    assert evaluator.precision == (precision if pays else "fp32")
    rough = evaluator.run(masks, images, rough=True)
    assert torch.equal(rough, before) != pays
    torch.testing.assert_close(rough, before, rtol=0, atol=0.05 * float(before.abs().max()))
    assert torch.equal(evaluator.run(masks, images), before)


def test_a_network_that_suffers_from_8_bits_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onp.ops.masked_forward.bytes_pay", lambda: True)
    monkeypatch.setattr("onp.evaluate.MOST_ERROR", 1e-6)
    model = network("resnet20")
    traced = trace(model, (3, 32, 32))
    evaluator = MaskEvaluator(traced, model)
    nothing, images = torch.zeros(1, traced.sites, dtype=torch.bool), torch.rand(3, 3, 32, 32)
    evaluator.calibrate("int8", nothing, images)
    assert evaluator.precision == "fp32"


def test_an_unknown_backend_is_refused() -> None:
    model = network("resnet20")
    with pytest.raises(UsageError, match="backend must be"):
        MaskEvaluator(trace(model, (3, 32, 32)), model, backend="cudnn")  # type: ignore[arg-type]
