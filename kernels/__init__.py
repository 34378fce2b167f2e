"""Triton kernels of the tile primitives, imported as fusedloss.kernels. Importing this package imports no triton."""
