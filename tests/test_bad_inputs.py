"""Bad inputs through the real command: one line, the right exit code, no output file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from onp import demo
from onp.__main__ import main

ARGUMENTS = {"model": str(demo.CHECKPOINT), "--arch": demo.ARCH, "--data": "data.npz"}


class Payload:
    """A pickle that would create a file if anything unpickled it fully."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("executed", "w")


def _missing() -> dict[str, str]:
    return {"model": "nowhere.pt"}


def _empty() -> dict[str, str]:
    Path("m.pt").write_bytes(b"")
    return {"model": "m.pt"}


def _pickle_with_code() -> dict[str, str]:
    Path("m.pt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    return {"model": "m.pt"}


def _zipped_pickle_with_code() -> dict[str, str]:
    torch.save({"state_dict": Payload()}, "m.pt")
    return {"model": "m.pt"}


def _wrong_arch() -> dict[str, str]:
    return {"--arch": "vgg16_bn"}


def _unknown_arch() -> dict[str, str]:
    return {"--arch": "resnet9000"}


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, str]:
    weights = load_file(demo.CHECKPOINT)
    change(weights)
    save_file(weights, "m.safetensors")
    return {"model": "m.safetensors"}


def _nan_weights() -> dict[str, str]:
    return _weights(lambda w: w["layer1.0.conv1.weight"].view(-1)[3].fill_(torch.nan))


def _negative_variance() -> dict[str, str]:
    return _weights(lambda w: w["layer2.0.bn1.running_var"][0].fill_(-1))


def _wrong_class_count() -> dict[str, str]:
    return _weights(lambda w: w.update({"linear.bias": torch.zeros(7)}))


def _extra_key() -> dict[str, str]:
    return _weights(lambda w: w.update({"layer9.0.weight": torch.zeros(7)}))


def _data(images: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    np.savez("d.npz", images=images, labels=labels)
    return {"--data": "d.npz"}


def _one_class() -> dict[str, str]:
    return _data(np.zeros((20, 32, 32, 3), np.uint8), np.zeros(20, int))


def _labels_out_of_range() -> dict[str, str]:
    return _data(np.zeros((20, 32, 32, 3), np.uint8), np.arange(20))


def _wrong_size() -> dict[str, str]:
    images = demo.clean_images()
    return _data(images.images[:40, ::8, ::8].numpy(), images.labels[:40].numpy())


def _too_small() -> dict[str, str]:
    return {"--arch": "vgg11_bn"} | _weights(lambda w: None)


def _no_folder() -> dict[str, str]:
    return {"--out": "missing/out.safetensors"}


def _folder_as_output() -> dict[str, str]:
    Path("out.safetensors").mkdir()
    return {}


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (_missing, 4, "nowhere.pt"),
        (_empty, 2, "empty"),
        (_pickle_with_code, 2, "refused"),
        (_zipped_pickle_with_code, 2, "open"),
        (_wrong_arch, 2, "not a vgg16_bn"),
        (_unknown_arch, 4, "resnet9000"),
        (_nan_weights, 2, "layer1.0.conv1.weight"),
        (_negative_variance, 2, "layer2.0.bn1.running_var"),
        (_wrong_class_count, 2, "linear.bias"),
        (_extra_key, 2, "layer9.0.weight"),
        (_one_class, 2, "all of class 0"),
        (_labels_out_of_range, 2, "labels must be in 0 .. 9"),
        (_wrong_size, 2, "answers only"),
        (_too_small, 2, "not a vgg11_bn"),
        (_no_folder, 4, "missing"),
        (_folder_as_output, 4, "out.safetensors"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_one_line_the_right_code_no_output(
    make: Callable[[], dict[str, str]],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images = demo.clean_images()
    np.savez("data.npz", images=images.images.numpy(), labels=images.labels.numpy())
    options = {**ARGUMENTS, "--out": "out.safetensors", **make()}
    model = options.pop("model")
    flat = [part for option in options.items() for part in option]
    assert main(["sanitize", model, *flat, "--quiet", "--report", "report.json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("onp: error: ")
    assert message in captured.err
    assert not Path("out.safetensors").is_file()
    assert not Path("report.json").exists()
    assert not Path("executed").exists()
