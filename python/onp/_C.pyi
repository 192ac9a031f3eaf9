"""The native module. Addresses are ``Tensor.data_ptr()`` of contiguous tensors that the caller
validated and keeps alive for the call."""

with_cuda: bool

# ---- message passing
def csr_check(indptr: int, indices: int, nodes: int, edges: int, /) -> None: ...
def csr_transpose(
    indptr: int, indices: int, nodes: int, t_indptr: int, t_indices: int, t_edge: int, /
) -> None: ...
def message_passing(
    float64: bool,
    x: int,
    weight: int,
    indptr: int,
    indices: int,
    out: int,
    batch: int,
    nodes: int,
    features: int,
    threads: int,
    /,
) -> None: ...
def message_passing_weight_grad(
    float64: bool,
    grad: int,
    x: int,
    indptr: int,
    indices: int,
    weight_grad: int,
    batch: int,
    nodes: int,
    features: int,
    threads: int,
    /,
) -> None: ...

# ---- neuron graph

# ---- masked forward
