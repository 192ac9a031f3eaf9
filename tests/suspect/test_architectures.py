"""Named networks are rebuilt from their weights alone, as they were and after a repair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from onp.__main__ import main
from onp.demo.images import draw
from onp.errors import UnsafeOrCorruptModel
from onp.suspect import architectures
from onp.suspect.architectures import convnext, densenet, mobilenetv3, vit
from onp.suspect.files import save_weights
from onp.suspect.load import load_suspect
from onp.suspect.surgery import remove_mask
from onp.suspect.trace import trace
from tests.networks import network

NAMES = ("mobilenetv2", "mobilenetv3", "densenet", "vit", "vit-mean", "convnext")


def arch_of(name: str) -> str:
    """The ``--arch`` of a network of the tests."""
    return {"vit-mean": "vit", "mobilenetv3": "mobilenetv3_cifar"}.get(name, name)


@pytest.mark.parametrize("name", NAMES)
def test_weights_find_their_network(name: str, tmp_path: Path) -> None:
    model = network(name)
    save_weights(tmp_path / "m.safetensors", model.state_dict())
    loaded = load_suspect(tmp_path / "m.safetensors", arch_of(name)).model
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_network_finds_itself_again(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    pruned = torch.rand(traced.sites, generator=torch.Generator().manual_seed(0)) < 0.4
    smaller, _ = remove_mask(model, traced, pruned)
    again = architectures.build(arch_of(name), smaller.state_dict())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
    assert sizes[0] < sizes[1]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), smaller(images))


@pytest.mark.parametrize("name", ["densenet", "vit", "convnext", "mobilenetv3"])
def test_the_command_line_takes_its_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, data = tmp_path / "m.safetensors", tmp_path / "d.npz"
    save_weights(weights, network(name).state_dict())
    drawn = draw(20, seed=0)
    np.savez(data, images=drawn.images.numpy(), labels=drawn.labels.numpy())
    code = main(["evaluate", str(weights), "--arch", arch_of(name), "--data", str(data), "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert json.loads(captured.out)["images"] == 20


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (densenet.of_width(16, 10), 0.46),
        (vit.of_width(64, 10), 0.31),
        (vit.of_width(96, 10), 0.68),
        (convnext.of_width(32, 10), 0.37),
        (mobilenetv3.of_width(0.5, 43), 0.42),
    ],
    ids=["densenet", "vit-64", "vit-96", "convnext", "mobilenetv3"],
)
def test_the_sizes_that_are_stated(model: nn.Module, millions: float) -> None:
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.02)


def test_variants_are_told_apart() -> None:
    """What is left out of the weights is left out of the network."""
    imagenet = densenet.DenseNet((8, 7), [[(8, 16, 4)], [(6, 16, 4)]], [(12, 6)], 3, large=True)
    unbiased = vit.ViT(192, 8, 17, [20], 3, qkv_bias=False)
    unscaled = convnext.ConvNeXt(4, [[(8, 12, 5, False)]], 3)
    images = torch.rand(2, 3, 32, 32)
    for arch, model in (("densenet", imagenet), ("vit", unbiased), ("convnext", unscaled)):
        again = architectures.build(arch, model.state_dict())
        with torch.no_grad():
            assert torch.equal(again(images), model.eval()(images))
    assert unbiased.blocks[0].attn.heads == 3


FIRST_KEYS = {
    "densenet": "features.conv0.weight",
    "vit": "patch_embed.proj.weight",
    "convnext": "downsample_layers.0.0.weight",
}


@pytest.mark.parametrize("arch", FIRST_KEYS)
def test_other_weights_are_refused_by_key(arch: str) -> None:
    with pytest.raises(UnsafeOrCorruptModel, match=f"not a {arch}: the weights lack"):
        architectures.build(arch, network("resnet20").state_dict())
    broken = network(arch).state_dict() | {FIRST_KEYS[arch]: torch.zeros(3)}
    with pytest.raises(UnsafeOrCorruptModel, match=f"{FIRST_KEYS[arch]}' must have 4"):
        architectures.build(arch, broken)


def test_a_width_that_heads_do_not_share_is_refused() -> None:
    state = vit.of_width(8, 3, 1).state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(6, 3, 4, 4)
    with pytest.raises(UnsafeOrCorruptModel, match="a width of 6 does not split into 4 heads"):
        architectures.build("vit", state)
