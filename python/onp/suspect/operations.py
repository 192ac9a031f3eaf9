"""The operations that a traced network is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

WEIGHTED = ("conv", "linear")
TRANSPARENT = ("maxpool", "avgpool", "globalpool", "flatten", "pick")
"""Kinds that map zero channels to zero channels and hold no weights."""
KEEP_ZERO = ("relu", "relu6", "gelu", "silu", "hardswish")
"""Activations that leave a zero a zero,"""
ACTIVATIONS = (*KEEP_ZERO, "sigmoid", "hardsigmoid", "pointwise")
"""and all."""
NORMS = ("norm", "layernorm", "groupnorm")


@dataclass(frozen=True)
class Op:
    """One operation of the traced network; value ``i`` is the output of ``trace.ops[i]``.

    A value is a map [N, C, H, W], tokens [N, C, T] or features [N, F]: channels always come first
    behind the images, wherever the module's own code has them.

    kind: one of
      input                     the images, [N, C, H, W]
      conv, linear              ``module`` is the nn.Conv2d / nn.Linear's qualified name, or that of
                                the nn.MultiheadAttention whose queries, keys and values it makes; a
                                linear layer reads features, or the channels of every token or pixel
      norm                      ``module`` is a BatchNorm2d/1d in eval mode (per-channel affine)
      layernorm                 over the channels of each token or pixel; ``module`` is the
                                nn.LayerNorm, None without weights; attrs["eps"]
      groupnorm                 over each group's channels and all positions; ``module`` is the
                                nn.GroupNorm, or nn.InstanceNorm2d, None without weights;
                                attrs["groups"], attrs["eps"]
      affine                    per-channel scale and shift: attrs["scale"], attrs["shift"] [C]
      parameter                 x + p, x - p, x * p or x / p with a tensor p of the model (position
                                embedding, layer scale): attrs["how"] is add, sub, mul or div, p is
                                attrs["name"]'s elements attrs["index"], int64 [C] or [C, *space]
      extend                    tokens of the model's own (class token), attrs["name"]'s elements
                                attrs["index"] int64 [C, T'], before (attrs["front"]) or behind x's
      relu, relu6, silu,        no attrs
      sigmoid, hardsigmoid,
      hardswish
      gelu                      attrs["approximate"]
      pointwise                 another function of each number, attrs["function"]
      add                       two inputs of the same shape
      product                   two inputs of the same shape, or the second with one position: a
                                number by which the image multiplies a channel
      concat                    the inputs' channels, one input behind the other
      attention                 softmax attention of inputs q, k, v (often one value): attrs["q"],
                                ["k"], ["v"] int64 [heads, D] are the channels that it reads,
                                attrs["scale"] or None; channel h * D + d comes from head h
      maxpool, avgpool          attrs: kernel, stride, padding (int pairs), count_include_pad,
                                ceil_mode (its size is rounded up)
      globalpool                mean over all positions, keeps [N, C, 1, 1] (tokens: [N, C, 1])
      subsample_pad             option-A shortcut: x[:, :, ::s, ::s] with its channels written to
                                attrs["positions"] (of attrs["channels"]); attrs["stride"]
      select                    some of the channels, in any order: attrs["channels"] int64 [C']
      pick                      positions of the flattened space, -1 for zeros: attrs["positions"]
                                int64 of the new space's shape; [N, C, H, W] to tokens, one token to
                                features, a map with zeros around it
      flatten                   [N, C, *space] -> [N, C * positions]
      output                    reads the logits
    Identity and (eval-mode) dropout are elided.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    module: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    def weights(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the module: of an nn.MultiheadAttention those that make queries, keys
        and values, [3 C, C] and [3 C]."""
        module = model.get_submodule(str(self.module))
        if isinstance(module, nn.MultiheadAttention):
            weight, bias = module.in_proj_weight, module.in_proj_bias
        else:
            weight, bias = module.weight, module.bias  # type: ignore[assignment]
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return weight, bias


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found
