// What the GPU kernels share. tests/cuda_on_cpu.h gives a meaning on the CPU to all that is not plain C++ in them.
#pragma once
#include <stdexcept>
#include <string>
#include "call.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

// The block's shared memory: the kernels lay it out themselves.
__device__ inline float* shared_memory() {
  extern __shared__ float4 dynamic[];
  return reinterpret_cast<float*>(dynamic);
}

inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}

template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, void* stream, P... args) {
  if (!blocks) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}
#endif

constexpr unsigned ALL = 0xffffffff;                     // lanes that take part in a shuffle

// Element i of a buffer of float32 or of bfloat16, to and fro (rounded to nearest, ties to even).
__device__ inline float get(const float* x, bool half, int64_t i) {
  return half ? __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(x)[i]) << 16) : x[i];
}

__device__ inline void put(float* x, bool half, int64_t i, float z) {
  const uint32_t bits = __float_as_uint(z);
  if (half) reinterpret_cast<uint16_t*>(x)[i] = z != z ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  else x[i] = z;
}

// Adds up M <= L values at once over groups of L neighbouring lanes: lane l of a group gets the total of x[l % M]. Each exchange
// halves what is left to add, so that this takes about M shuffles, not M log2(L).
template <int L, int M>
__device__ float totals(float (&x)[M]) {
#pragma unroll
  for (int apart = 1; apart < M; apart *= 2) {
    const bool odd = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < M / (2 * apart); ++i) {
      const float keep = odd ? x[2 * i + 1] : x[2 * i], give = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = keep + __shfl_xor_sync(ALL, give, apart);
    }
  }
#pragma unroll
  for (int apart = M; apart < L; apart *= 2) x[0] += __shfl_xor_sync(ALL, x[0], apart);
  return x[0];
}
