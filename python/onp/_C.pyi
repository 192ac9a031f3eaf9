"""The native module. Addresses are ``Tensor.data_ptr()`` of contiguous tensors that the caller
validated and keeps alive for the call."""

with_cuda: bool

# ---- message passing

# ---- neuron graph

# ---- masked forward
