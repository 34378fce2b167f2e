// The NeuralNDCG on the CPU.
