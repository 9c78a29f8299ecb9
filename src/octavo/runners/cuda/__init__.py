"""The CUDA runner: Triton kernels and one captured graph a decode step. `kind` is what the rest of Octavo sees."""
