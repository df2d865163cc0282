"""CUDA kernels of an expert layer for zeda_megatron, which finds them by their entry point (`experts.KERNELS`)."""
