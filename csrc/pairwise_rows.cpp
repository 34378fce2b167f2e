// The vector loops of pairwise ranking losses, compiled once per instruction set.
