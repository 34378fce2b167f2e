// The vector loops of sparsemax and entmax, compiled once per instruction set.
