"""Triton kernels of the fused operators, installed as `fastrel.triton_kernels`: one file per operator, kernels and launchers."""
