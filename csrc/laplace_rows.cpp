// The vector loops of LapSum, compiled once per instruction set.
