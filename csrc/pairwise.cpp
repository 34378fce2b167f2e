// The pairwise ranking losses on the CPU.
