"""Executes and checks the GPU kernels on a machine without a GPU. See README.md in this folder."""
