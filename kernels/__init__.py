"""Triton kernels, imported as fusedloss.kernels: none yet."""
