// Kernels of the neuron graph for any processor.
#include "core/neuron_graph_tile.h"

namespace onp {

const GraphKernels kGenericGraphKernels = graph_kernels();

}  // namespace onp
