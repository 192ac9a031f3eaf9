// Kernels of the neuron graph for AVX2 with FMA.
#include "core/neuron_graph_tile.h"

namespace onp {

const GraphKernels kAvx2GraphKernels = graph_kernels();

}  // namespace onp
