"""Triton kernels, one file per operator. Imported only when the triton backend is chosen."""
