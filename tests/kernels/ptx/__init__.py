"""An interpreter of PTX: runs what nvcc made of our kernels on a machine without a GPU, slowly and suspiciously.

The library's host code runs as it is, over a stand-in for the CUDA runtime (`fake_cuda.cpp`); `machine.Machine`
takes each launch and interprets the kernel's PTX, warp by warp in an order drawn at random. Memory starts as NaN,
accesses are checked against what the test allowed, asynchronous copies and products happen late, and what no fence has
shown to the asynchronous proxy may not be read by it. It knows the instructions that our kernels use and stops at any
other.

It is no GPU: nothing here says how fast a kernel is, nor finds what only a weak memory model shows.
"""
