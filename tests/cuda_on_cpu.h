// CUDA's words with a meaning on the CPU, so that the kernels of wkv_cuda/*.cu can be run, and their races found, without a GPU.
//
// Each CUDA thread is a fibre that runs alone until it waits: at __syncthreads for its block, at a shuffle for its warp. Blocks run one
// after the other. `emulator_order` seeds which warp goes first, always as far as it can before another one starts, and which lane of
// a warp: a result that depends on the order is a race. `emulator_skip` makes the barrier in one place do nothing.
// Shared memory starts as NaN, and it is an error to write past its end, to wait where others of the warp or block never will, or
// to leave a kernel while others wait.
#pragma once
#undef _FORTIFY_SOURCE    // Ubuntu sets it, and it takes every jump to another fibre for a fault
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x; };

namespace emulator {

enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };
struct Fibre {
  jmp_buf at;
  State state;
  bool started;
  int turn;                                              // which of the two slots the next shuffle uses
  uint32_t slot[2][6];
  std::vector<std::function<void()>> copies;             // asked for, not yet made
};

inline Index thread, block;
inline std::vector<Fibre> fibres;
inline std::vector<char> stacks, memory;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int64_t order = 0;
inline std::string skipped;                              // a place, as wkv7.cu:120

constexpr size_t STACK = 1 << 16, FENCE = 4096;

inline void wait(State why) {
  Fibre& f = fibres[thread.x];
  f.state = why;
  if (!_setjmp(f.at)) _longjmp(scheduler, 1);
}

inline void barrier(const std::string& place) {
  const bool skip = !skipped.empty() && place.size() > skipped.size() && !place.compare(place.size() - skipped.size(), skipped.size(), skipped);
  if (!skip) wait(AT_BARRIER);
}

// Gives `count` words to the other lanes of the warp -> from(lane), the words that one of them gives.
inline auto exchange(const void* words, int count) {
  Fibre& f = fibres[thread.x];
  const int turn = f.turn;
  std::memcpy(f.slot[turn], words, 4 * count);
  f.turn = 1 - turn;
  wait(AT_SHUFFLE);
  return [turn, warp = thread.x / 32 * 32](unsigned lane) { return fibres[warp + lane % 32].slot[turn]; };
}

template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) == 4);
  std::memcpy(&value, exchange(&value, 1)(lane), 4);
  return value;
}

inline void entry() {
  body();
  fibres[thread.x].state = DONE;
  _longjmp(scheduler, 1);
}

inline void go_on(unsigned id) {
  thread.x = id;
  Fibre& f = fibres[id];
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks.data() + id * STACK;
  context.uc_stack.ss_size = STACK;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

inline std::vector<unsigned> shuffled(unsigned n, std::mt19937& random) {       // order 0: as they are, 1: backwards, else at random
  std::vector<unsigned> ids(n);
  for (unsigned i = 0; i < n; ++i) ids[i] = order == 1 ? n - 1 - i : i;
  if (order > 1) std::shuffle(ids.begin(), ids.end(), random);
  return ids;
}

inline void run_block(unsigned threads) {
  std::mt19937 random(order * 7919 + block.x);
  fibres.assign(threads, Fibre{{}, READY, false, 0, {}, {}});
  const auto all = [&](unsigned from, unsigned to, auto is) { return std::all_of(&fibres[from], &fibres[0] + to, is); };
  const auto done = [](const Fibre& f) { return f.state == DONE; };
  while (!all(0, threads, done)) {
    for (unsigned warp : shuffled(threads / 32, random)) {
      const unsigned from = warp * 32, to = from + 32;
      for (;;) {
        for (unsigned lane : shuffled(32, random))
          if (fibres[from + lane].state == READY) go_on(from + lane);
        const auto waits = [](const Fibre& f) { return f.state == AT_SHUFFLE; };
        if (std::none_of(&fibres[from], &fibres[0] + to, waits)) break;
        if (!all(from, to, waits)) throw std::runtime_error("emulator: a shuffle that not all lanes of the warp take part in");
        for (unsigned i = from; i < to; ++i) fibres[i].state = READY;
      }
    }
    if (all(0, threads, done)) break;
    if (!all(0, threads, [](const Fibre& f) { return f.state == AT_BARRIER; }))
      throw std::runtime_error("emulator: a thread has left before a barrier");
    for (Fibre& f : fibres) f.state = READY;
  }
}

}  // namespace emulator

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx emulator::thread
#define blockIdx emulator::block
#define EMULATOR_TEXT(x) #x
#define EMULATOR_LINE(x) EMULATOR_TEXT(x)
#define __syncthreads() emulator::barrier(__FILE__ ":" EMULATOR_LINE(__LINE__))

template <class T> T __shfl_sync(unsigned, T value, int lane) { return emulator::shuffle(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return emulator::shuffle(value, emulator::thread.x % 32 ^ mask); }
inline float __uint_as_float(uint32_t x) { float z; std::memcpy(&z, &x, 4); return z; }
inline uint32_t __float_as_uint(float x) { uint32_t z; std::memcpy(&z, &x, 4); return z; }

inline uint32_t pack(float low, float high) {            // rounded to nearest, ties to even
  const auto half = [](float x) { const uint32_t z = __float_as_uint(x); return x != x ? 0x7fff : (z + 0x7fff + (z >> 16 & 1)) >> 16; };
  return half(low) | half(high) << 16;
}

inline void copy16(void* to, const void* from, bool there) {
  emulator::fibres[emulator::thread.x].copies.push_back([=] { there ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); });
}
inline void copied() {
  for (auto& copy : std::exchange(emulator::fibres[emulator::thread.x].copies, {})) copy();
}

// See gpu.h for what a lane holds.
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t words[6];
  std::memcpy(words, a, 16);
  std::memcpy(words + 4, b, 8);
  const unsigned lane = emulator::thread.x % 32;
  const auto from = emulator::exchange(words, 6);
  const auto half = [&](int lane, int word, int k) { return __uint_as_float(k % 2 ? from(lane)[word] & 0xffff0000 : from(lane)[word] << 16); };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k)
      d[e] += half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k) * half(col * 4 + k % 8 / 2, 4 + k / 8, k);
  }
}

inline float* shared_memory() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(emulator::memory.data()) + 127) & ~127ull); }

template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, void*, P... args) {
  using namespace emulator;
  if (threads % 32 || shared > 227 * 1024) throw std::runtime_error("emulator: no GPU runs such a block");
  stacks.resize(threads * STACK);
  body = [&] { kernel(args...); };
  for (block.x = 0; block.x < blocks; ++block.x) {
    memory.assign(shared + FENCE + 128, '\xff');         // 0xffffffff is a NaN
    run_block(threads);
    const char* end = reinterpret_cast<char*>(shared_memory()) + shared;
    if (std::any_of(end, end + FENCE / 2, [](char c) { return c != '\xff'; })) throw std::runtime_error("emulator: written past shared memory");
  }
}
