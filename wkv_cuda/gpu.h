// What the GPU kernels share. tests/cuda_on_cpu.h gives what is not plain C++ in them a meaning on the CPU.
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

// Two floats as bfloat16 in one word, the first in its lower half.
__device__ inline uint32_t pack(float low, float high) {
  uint32_t z;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(high), "f"(low));
  return z;
}

// d += a b for a warp: d (16 x 8) float32, a (16 x 16) and b (16 x 8) bfloat16. With g = lane / 4 and
// i = lane % 4 a lane holds of
// d: rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2i and 2i + 1
// a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 2i and 2i + 1 (a[0], a[1]), 8 more (a[2], a[3])
// b: column g, rows 2i and 2i + 1 (b[0]), the same + 8 (b[1])
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, zeros unless `there`; both addresses are multiples of 16. They
// arrive some time before `copied` returns to the thread that asked for them.
__device__ inline void copy16(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0));
}
__device__ inline void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }

inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}

template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, void* stream, P... args) {
  if (!blocks) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}
#endif

constexpr unsigned ALL = 0xffffffff;                     // lanes that take part in a shuffle

// The buffers of Wkv7 in their order: bits of `half`, which says what is bfloat16.
enum { R, W, K, V, A, B, S0, C, Y, S, MID, SA, DY, DS, DR, DW, DK, DV, DA, DB };

// Where a head's tokens and states lie; a block of threads has one head.
struct Head {
  int64_t bh, bi, h, step, base, chunks;
  __device__ explicit Head(const Wkv7& p)
      : bh(blockIdx.x), bi(bh / p.H), h(bh % p.H), step(p.H * p.N), base((bi * p.T * p.H + h) * p.N),
          chunks((p.T + CHUNK - 1) / CHUNK) {}
  __device__ int64_t state(const Wkv7& p, int64_t n) const {
    return (p.every ? (bi * p.states() + n) * p.H + h : bh) * p.N * p.N;
  }
  __device__ int64_t mid(const Wkv7& p, int64_t n) const { return (bh * chunks + n) * p.N * p.N; }
};

// The recurrence in wkv7_bf16.cu -> whether that is for such a call: r is bfloat16, and states are returned
// at chunk starts only.
bool wkv7_bf16(const Wkv7& p, unsigned half, void* stream);

// Element i of a buffer of float32 or of bfloat16, as it lies there: `half` is a branch for the compiler, and
// what is computed inside of it waits for the memory, one element after the other. So read first, all that is
// at hand, and turn it into numbers afterwards.
__device__ inline uint32_t raw(const float* x, bool half, int64_t i) {
  return half ? reinterpret_cast<const uint16_t*>(x)[i] : reinterpret_cast<const uint32_t*>(x)[i];
}
__device__ inline float number(uint32_t raw, bool half) { return __uint_as_float(half ? raw << 16 : raw); }
__device__ inline float get(const float* x, bool half, int64_t i) { return number(raw(x, half, i), half); }

__device__ inline void put(float* x, bool half, int64_t i, float z) {
  if (half) reinterpret_cast<uint16_t*>(x)[i] = pack(z, 0);
  else x[i] = z;
}

// Elements i and i + 1; i is even.
__device__ inline void put(float* x, bool half, int64_t i, float y, float z) {
  if (half) reinterpret_cast<uint32_t*>(x)[i / 2] = pack(y, z);
  else *reinterpret_cast<float2*>(x + i) = {y, z};
}

// Adds up M <= L values at once over groups of L neighbouring lanes: lane l of a group gets the total of
// x[l % M]. Each exchange halves what is left to add, so that this takes about M shuffles, not M log2(L).
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
