// Kernels of the neuron graph for AVX-512.
#include "core/neuron_graph_tile.h"

namespace onp {

const GraphKernels kAvx512GraphKernels = graph_kernels();

}  // namespace onp
