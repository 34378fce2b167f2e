// The vector loops of NeuralSort and SoftSort, compiled once per instruction set.
