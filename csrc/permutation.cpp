// The NeuralSort and SoftSort on the CPU.
