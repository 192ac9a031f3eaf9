// neuron_graph
