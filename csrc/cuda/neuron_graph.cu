// neuron graph, CUDA
