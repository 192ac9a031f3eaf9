"""The native module. Addresses are ``Tensor.data_ptr()`` of contiguous tensors that the caller
validated and keeps alive for the call."""

with_cuda: bool

# ---- message passing

# ---- neuron graph

# ---- masked forward

def instruction_sets() -> list[str]: ...

class MaskedForwardStep:
    def __init__(
        self,
        *,
        kind: int,
        input: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        groups: int,
        count_include_pad: bool,
        weight: int,
        bias: int,
        residual: int,
        first: int,
        plain: int,
        scale: int,
        shift: int,
        second: int,
        site_start: int,
        final: int,
    ) -> None: ...

class MaskedForwardPlan:
    def __init__(
        self,
        buffers: list[tuple[int, int, int]],
        steps: list[MaskedForwardStep],
        output: int,
        sites: int,
    ) -> None: ...
    def least_bytes(self, share: bool) -> int: ...
    def run(
        self,
        *,
        images: int,
        count: int,
        masks: int,
        batch: int,
        words: int,
        logits: int,
        share: bool,
        threads: int,
        max_bytes: int,
        isa: str,
    ) -> None: ...
