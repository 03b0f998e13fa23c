"""Triton kernels, one file for a family of operators, imported only for the triton backend."""
