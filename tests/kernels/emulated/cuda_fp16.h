// CUDA's half stands for float here: the same kernels, without rounding.
#pragma once

struct __half {
  float value = 0;
  __half() = default;
  explicit __half(float value) : value(value) {}
  explicit operator float() const { return value; }
};
