// The vector loops of NeuralNDCG, compiled once per instruction set.
