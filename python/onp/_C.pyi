"""The native module. Addresses are ``Tensor.data_ptr()`` of contiguous tensors that the caller
validated and keeps alive for the call."""

with_cuda: bool

# ---- message passing
def csr_check(indptr: int, indices: int, nodes: int, edges: int, /) -> None: ...
def csr_transpose(
    indptr: int, indices: int, nodes: int, t_indptr: int, t_indices: int, t_edge: int, /
) -> None: ...
def message_passing(
    dtype: str,
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
    dtype: str,
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
def message_passing_gradients(
    dtype: str,
    grad: int,
    x: int,
    weight: int,
    t_indptr: int,
    t_indices: int,
    t_edge: int,
    x_grad: int,
    weight_grad: int,
    batch: int,
    nodes: int,
    features: int,
    threads: int,
    /,
) -> None: ...

# ---- neuron graph
def connection_strengths(
    layers: list[tuple[int, int, int]], out: list[int], threads: int, /
) -> None:
    """Layers: address, pairs, kernel."""

class EdgeChoice:
    """Matrices: address, rows, columns."""

    @staticmethod
    def strongest(strengths: list[tuple[int, int, int]], k: int, threads: int, /) -> EdgeChoice: ...
    @staticmethod
    def similar(
        vectors: list[tuple[int, int, int]], threshold: float, max_neighbours: int, threads: int, /
    ) -> EdgeChoice: ...
    @property
    def bounds(self) -> list[int]:
        """Where each matrix's edges begin among all edges, and the number of all."""

    def write(self, rows: int, cols: int, values: int, threads: int, /) -> None: ...

def connection_strengths_cuda(
    device: int, stream: int, layers: list[tuple[int, int, int]], out: int, /
) -> None:
    """Layers: address, pairs, kernel. Exists where ``with_cuda`` is True."""

class EdgeSelection:
    """Matrices: device address, rows, columns. Exists where ``with_cuda`` is True."""

    @staticmethod
    def strongest(strengths: list[tuple[int, int, int]], k: int, /) -> EdgeSelection: ...
    @staticmethod
    def similar(
        vectors: list[tuple[int, int, int]], threshold: float, max_neighbours: int, /
    ) -> EdgeSelection: ...
    @property
    def scratch_bytes(self) -> int: ...
    def choose(self, device: int, stream: int, scratch: int, /) -> list[int]:
        """Where each matrix's edges begin among all edges, and the number of all."""

    def write(
        self, device: int, stream: int, scratch: int, rows: int, cols: int, values: int, /
    ) -> None: ...

def csr_from_edges(
    nodes: int,
    edges: int,
    rows: int,
    cols: int,
    values: int,
    out_indptr: int,
    out_indices: int,
    out_values: int,
    /,
) -> int: ...

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
        others: list[int],
        index: list[int],
        heads: int,
        value: float,
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
        constants: list[tuple[int, int]],
        output: int,
        sites: int,
        ranges: list[tuple[int, float, list[float]]],
        halves: bool,
    ) -> None: ...
    @property
    def narrow_steps(self) -> int: ...
    def ranges(
        self, *, images: int, count: int, masks: int, batch: int, words: int, isa: str
    ) -> list[tuple[int, float, list[float]]]: ...
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

# ---- masked gradient

class MaskedGradientInput:
    """Address 0: absent."""

    def __init__(
        self,
        *,
        images: int,
        count: int,
        gates: int,
        workspace: int,
        moments: bool,
        threads: int,
        isa: str,
    ) -> None: ...

class MaskedGradientPlan:
    def __init__(
        self,
        buffers: list[tuple[int, int, int]],
        steps: list[MaskedForwardStep],
        norms: list[tuple[int, int]],
        constants: list[tuple[int, int]],
        output: int,
        sites: int,
        units: int,
    ) -> None: ...
    def workspace_floats(self, count: int, gated: bool, moments: bool) -> int: ...
    def forward(
        self, input: MaskedGradientInput, /, *, logits: int, mean: int, variance: int
    ) -> None: ...
    def backward(
        self,
        input: MaskedGradientInput,
        /,
        *,
        logits: int,
        slope: int,
        offset: int,
        images: int,
        gates: int,
    ) -> None: ...
