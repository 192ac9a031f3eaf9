"""A network with its masks as an input: what a user of any runtime would write."""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn

from onp.suspect.trace import Trace


def gated(model: nn.Module, trace: Trace) -> fx.GraphModule:
    """``model`` as a function of images [N, C, H, W] and gates float [S], which multiply what the
    consumers of their sites read."""
    graph_module = fx.symbolic_trace(model.eval())
    graph = graph_module.graph
    places = {str(trace.ops[c].module): layer for layer in trace.layers for c in layer.consumers}
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        gates = graph.placeholder("gates")
    for node in list(graph.nodes):
        layer = places.get(str(node.target)) if node.op == "call_module" else None
        if layer is None:
            continue
        consumer = model.get_submodule(str(node.target))
        with graph.inserting_before(node):
            own = graph.call_function(operator.getitem, (gates, layer.sites))
            if isinstance(consumer, nn.Conv2d):
                shaped = graph.call_method("view", (own, 1, -1, 1, 1))
            else:  # a flattened map: every channel's pixels in turn
                pixels = consumer.in_features // layer.channels
                shaped = graph.call_method("repeat_interleave", (own, pixels))
            node.replace_input_with(
                node.args[0], graph.call_function(operator.mul, (node.args[0], shaped))
            )
    graph.lint()
    graph_module.recompile()
    return graph_module.requires_grad_(False)


def gates_of(pruned: Tensor) -> Tensor:
    """bool [B, S] to float32 [B, S]: 0 where pruned."""
    return (~pruned).float()
