// RWKV-7 recurrence on the GPU: forward and backward for any T, N in {16, 32, 64, 128}. Every input is
// float32 or bfloat16, each for itself, and its gradient likewise; states and sums are float32.
//
//   sa_t = S_{t-1} a_t + c_t
//   S_t  = S_{t-1} diag(exp w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// A block of threads walks along one head's tokens. The state stays in registers: a thread holds a tile of
// some rows (value channels) by some columns (key channels), so that what it reads of a token serves several
// elements, and the sums over rows and columns are half done before threads must talk to each other.
#include "gpu.h"

namespace {

// A row lies with LANES neighbouring threads, which take turns in pieces of 4 columns: reading them causes no
// bank conflicts.
template <int N, int ROWS, int COLS>
struct Tile {
  static constexpr int LANES = N / COLS, THREADS = N / ROWS * LANES;
  static_assert(THREADS % 32 == 0 && 32 % LANES == 0 && 2 * ROWS <= LANES && COLS % 4 == 0);
  float x[ROWS][COLS];

  __device__ static int lane() { return threadIdx.x % LANES; }
  __device__ static int row() { return threadIdx.x / LANES * ROWS; }  // the first of its rows ...
  // ... of columns m..m+3; m is a multiple of 4
  __device__ static int col(int m) { return m * LANES + 4 * lane(); }

  __device__ static void columns(const float* from, float (&to)[COLS]) {  // the thread's part of a vector
#pragma unroll
    for (int m = 0; m < COLS; m += 4) {
      const float4 z = *reinterpret_cast<const float4*>(from + col(m));
      to[m] = z.x, to[m + 1] = z.y, to[m + 2] = z.z, to[m + 3] = z.w;
    }
  }
  __device__ static void rows(const float* from, float (&to)[ROWS]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) to[i] = from[row() + i];
  }
  __device__ void zero() {
#pragma unroll
    for (auto& row : x)
#pragma unroll
      for (float& z : row) z = 0;
  }
  __device__ void load(const float* from) {                                           // of an N x N matrix
#pragma unroll
    for (int i = 0; i < ROWS; ++i) columns(from + (row() + i) * N, x[i]);
  }
  __device__ void add(const float* from) {
    Tile z;
    z.load(from);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int m = 0; m < COLS; ++m) x[i][m] += z.x[i][m];
  }
  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int m = 0; m < COLS; m += 4)
        *reinterpret_cast<float4*>(to + (row() + i) * N + col(m)) =
            {x[i][m], x[i][m + 1], x[i][m + 2], x[i][m + 3]};
  }
};

// ---- forward: STAGE tokens are read while the STAGE before them are worked on ----

constexpr int STAGE = 8;
// what shared memory holds of each token: exp w, ...; A_ is the next token's
enum { E_, K_, B_, R_, A_, V_, C_, VECTORS };

template <int N>
struct Forward : Tile<N, 2, N / 4> {
  using T = Tile<N, 2, N / 4>;
  static constexpr int EACH = STAGE * N / T::THREADS, SHARED = 2 * STAGE * VECTORS * N;
  uint32_t read[VECTORS][EACH];

  // Elements thread, thread + THREADS, ... of tokens t..t+STAGE-1; after the last token come identity steps.
  __device__ void fetch(const Wkv7& p, unsigned half, const Head& at, int64_t t) {
    const float* from[] = {p.w, p.k, p.b, p.r, p.a, p.v, p.c};
    const int bit[] = {W, K, B, R, A, V, C};
#pragma unroll
    for (int x = 0; x < VECTORS; ++x)
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int e = i * T::THREADS + threadIdx.x;
        const int64_t token = t + e / N + (x == A_);
        const int64_t o = at.base + token * at.step + e % N;
        read[x][i] = from[x] && token < p.T ? raw(from[x], half >> bit[x] & 1, o) : 0;
      }
  }
  __device__ void put(unsigned half, float* to) const {
    const int bit[] = {W, K, B, R, A, V, C};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int e = i * T::THREADS + threadIdx.x;
#pragma unroll
      for (int x = 0; x < VECTORS; ++x) {
        const float z = number(read[x][i], half >> bit[x] & 1);
        to[(e / N * VECTORS + x) * N + e % N] = x == E_ ? expf(z) : z;
      }
    }
  }
};

template <int N>
__global__ void __launch_bounds__(2 * N) forward(const Wkv7 p, const unsigned half) {
  using F = Forward<N>;
  constexpr int ROWS = 2, COLS = N / 4;
  float* shared = shared_memory();
  const Head at(p);
  F s;
  if (p.s0) s.load(p.s0 + at.bh * N * N);
  else s.zero();
  float sums[2 * ROWS], sa[ROWS] = {};                   // sums over the row: y, and S a of the next token
  const int lane = F::lane(), first = threadIdx.x % 32 - lane, row = F::row();
  auto add_up = [&] {
    const float total = totals<F::LANES>(sums);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sa[i] = __shfl_sync(ALL, total, first + ROWS + i);
    return total;
  };
  if (p.T) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      sums[i] = sums[ROWS + i] = 0;
#pragma unroll
      for (int m = 0; m < COLS; ++m)
        sums[ROWS + i] += s.x[i][m] * get(p.a, half >> A & 1, at.base + F::col(m / 4 * 4) + m % 4);
    }
    add_up();
    s.fetch(p, half, at, 0);
    s.put(half, shared);
  }
  __syncthreads();
  int64_t due = p.every ? 0 : -1;                        // the next state to return
  for (int64_t t0 = 0; t0 < p.T; t0 += STAGE) {
    const int now = t0 / STAGE % 2;
    s.fetch(p, half, at, t0 + STAGE);
    if (p.mid && t0 % CHUNK == 0) s.store(p.mid + at.mid(p, t0 / CHUNK));
    for (int q = 0; q < STAGE && t0 + q < p.T; ++q) {
      const int64_t t = t0 + q, o = at.base + t * at.step;
      const float* in = shared + (now * STAGE + q) * VECTORS * N;
      if (t == due) {
        s.store(p.s + at.state(p, t / p.every));
        due += p.every;
      }
      float v[ROWS], c[ROWS];
      F::rows(in + V_ * N, v);
      F::rows(in + C_ * N, c);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        sa[i] += c[i];
        if (p.sa && lane == i) p.sa[o + row + i] = sa[i];
        sums[i] = sums[ROWS + i] = 0;
      }
#pragma unroll
      for (int m = 0; m < COLS; m += 4) {
        float4 z[5];
#pragma unroll
        for (int x = 0; x < 5; ++x) z[x] = *reinterpret_cast<const float4*>(in + x * N + F::col(m));
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const float e = (&z[E_].x)[d], k = (&z[K_].x)[d], b = (&z[B_].x)[d], r = (&z[R_].x)[d];
          const float a = (&z[A_].x)[d];
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
            float& x = s.x[i][m + d];
            x = x * e + (sa[i] * b + v[i] * k);
            sums[i] += x * r;
            sums[ROWS + i] += x * a;
          }
        }
      }
      const float total = add_up();
      if (lane < ROWS) put(p.y, half >> Y & 1, o + row + lane, total);
    }
    s.put(half, shared + (1 - now) * STAGE * VECTORS * N);
    __syncthreads();
  }
  if (!p.every || p.T == due) s.store(p.s + at.state(p, p.every ? p.T / p.every : 0));
}

// ---- backward: chunk by chunk from the last to the first ----
// The states inside a chunk are computed anew from its saved start. Only GROUP states fit the registers
// beside the gradient of the state, so the tokens before a group are walked through again for it.

template <int N> struct Back;
template <> struct Back<16> : Tile<16, 2, 4> { static constexpr int ROWS = 2, COLS = 4, GROUP = 4; };
template <> struct Back<32> : Tile<32, 4, 4> { static constexpr int ROWS = 4, COLS = 4, GROUP = 4; };
template <> struct Back<64> : Tile<64, 4, 4> { static constexpr int ROWS = 4, COLS = 4, GROUP = 4; };
template <> struct Back<128> : Tile<128, 8, 8> { static constexpr int ROWS = 8, COLS = 8, GROUP = 1; };

enum { SA_ = 6, DY_ = 7, INPUTS = 8, SUMS = 5 };         // A_ is now the token's own

template <int N>
struct Token {  // what a thread's tile needs of a token to go one step on
  float e[Back<N>::COLS], k[Back<N>::COLS], b[Back<N>::COLS], v[Back<N>::ROWS], sa[Back<N>::ROWS];
  __device__ explicit Token(const float* in) {
    Back<N>::columns(in + E_ * N, e);
    Back<N>::columns(in + K_ * N, k);
    Back<N>::columns(in + B_ * N, b);
    Back<N>::rows(in + V_ * N, v);
    Back<N>::rows(in + SA_ * N, sa);
  }
  __device__ float step(const Back<N>& s, int i, int m) const {
    return s.x[i][m] * e[m] + (sa[i] * b[m] + v[i] * k[m]);
  }
  __device__ void step(const Back<N>& s, Back<N>& to) const {
#pragma unroll
    for (int i = 0; i < Back<N>::ROWS; ++i)
#pragma unroll
      for (int m = 0; m < Back<N>::COLS; ++m) to.x[i][m] = step(s, i, m);
  }
};

template <int N>
__global__ void __launch_bounds__(Back<N>::THREADS, N == 64 ? 2 : 1)
backward(const Wkv7 p, const unsigned half) {
  using T = Back<N>;
  constexpr int ROWS = T::ROWS, COLS = T::COLS, GROUP = T::GROUP, WARPS = T::THREADS / 32;
  float *in = shared_memory(), *part = in + CHUNK * INPUTS * N;  // part: each warp's sums over its rows
  const Head at(p);
  const int lane = T::lane(), first = threadIdx.x % 32 - lane, row = T::row(), warp = threadIdx.x / 32;
  T d;                                                   // the gradient of the state
  d.zero();
  // that of the returned state number n
  auto add_ds = [&](int64_t n) { if (p.ds) d.add(p.ds + at.state(p, n)); };
  if (!p.every) add_ds(0);
  int64_t due = p.every ? p.T / p.every * p.every : -1;  // the last state returned that is still to come
  for (int64_t n = at.chunks - 1; n >= 0; --n) {
    const int64_t t0 = n * CHUNK;
    const int len = p.T - t0 < CHUNK ? p.T - t0 : CHUNK;
    const float* from[] = {p.w, p.k, p.b, p.r, p.a, p.v, p.sa, p.dy};
    const int bit[] = {W, K, B, R, A, V, SA, DY};
    constexpr int EACH = CHUNK * N / T::THREADS;
#pragma unroll
    for (int x = 0; x < INPUTS; ++x) {
      uint32_t read[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int e = i * T::THREADS + threadIdx.x, q = e / N;
        read[i] = q < len ? raw(from[x], half >> bit[x] & 1, at.base + (t0 + q) * at.step + e % N) : 0;
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int e = i * T::THREADS + threadIdx.x;
        const float z = number(read[i], half >> bit[x] & 1);
        in[(e / N * INPUTS + x) * N + e % N] = x == E_ ? expf(z) : z;
      }
    }
    __syncthreads();
    for (int q0 = (len - 1) / GROUP * GROUP; q0 >= 0; q0 -= GROUP) {
      T s[GROUP];                                        // before each token of the group
      s[0].load(p.mid + at.mid(p, n));
      for (int q = 0; q < q0; ++q) Token<N>(in + q * INPUTS * N).step(s[0], s[0]);
#pragma unroll
      for (int g = 1; g < GROUP; ++g) Token<N>(in + (q0 + g - 1) * INPUTS * N).step(s[g - 1], s[g]);
#pragma unroll
      for (int g = GROUP - 1; g >= 0; --g) {
        if (q0 + g >= len) continue;
        const int64_t t = t0 + q0 + g, o = at.base + t * at.step;
        if (t + 1 == due) {
          add_ds(due / p.every);
          due -= p.every;
        }
        const float* token = in + (q0 + g) * INPUTS * N;
        const Token<N> z(token);
        float r[COLS], a[COLS], dy[ROWS], sums[2 * ROWS], dsa[ROWS];
        T::columns(token + R_ * N, r);
        T::columns(token + A_ * N, a);
        T::rows(token + DY_ * N, dy);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {                 // over the row: dv and the gradient of S a + c
          sums[i] = sums[ROWS + i] = 0;
#pragma unroll
          for (int m = 0; m < COLS; ++m) {
            d.x[i][m] += dy[i] * r[m];
            sums[i] += d.x[i][m] * z.k[m];
            sums[ROWS + i] += d.x[i][m] * z.b[m];
          }
        }
        const float total = totals<T::LANES>(sums);
        if (lane < ROWS) put(p.dv, half >> DV & 1, o + row + lane, total);
        else if (lane < 2 * ROWS && p.dc) p.dc[o + row + lane - ROWS] = total;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) dsa[i] = __shfl_sync(ALL, total, first + ROWS + i);
#pragma unroll
        for (int m = 0; m < COLS; m += 4) {
          float4 over[SUMS];                             // over the columns: dr, dw, dk, da, db
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float dr = 0, dw = 0, dk = 0, da = 0, db = 0;
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
              const float before = s[g].x[i][m + c];
              const float after = g + 1 < GROUP ? s[(g + 1) % GROUP].x[i][m + c] : z.step(s[g], i, m + c);
              float& grad = d.x[i][m + c];
              dr += after * dy[i];
              dw += grad * before;
              dk += grad * z.v[i];
              da += before * dsa[i];
              db += grad * z.sa[i];
              grad = grad * z.e[m + c] + dsa[i] * a[m + c];
            }
            const float sums[] = {dr, dw * z.e[m + c], dk, da, db};
#pragma unroll
            for (int x = 0; x < SUMS; ++x) {
              float& sum = (&over[x].x)[c];
              sum = sums[x];
#pragma unroll
              for (int apart = T::LANES; apart < 32; apart *= 2) sum += __shfl_xor_sync(ALL, sum, apart);
            }
          }
#pragma unroll
          for (int x = 0; x < SUMS; ++x) {
            float* to = part + ((g * WARPS + warp) * SUMS + x) * N + T::col(m);
            if (!first) *reinterpret_cast<float4*>(to) = over[x];
          }
        }
      }
      __syncthreads();
      float* const to[] = {p.dr, p.dw, p.dk, p.da, p.db};
      const int out[] = {DR, DW, DK, DA, DB};
#pragma unroll
      for (int x = 0; x < SUMS; ++x)
        for (int e = threadIdx.x; e < GROUP * N; e += T::THREADS) {
          const int g = e / N, j = e % N;
          float sum = 0;
#pragma unroll
          for (int i = 0; i < WARPS; ++i) sum += part[((g * WARPS + i) * SUMS + x) * N + j];
          if (q0 + g < len) put(to[x], half >> out[x] & 1, at.base + (t0 + q0 + g) * at.step + j, sum);
        }
      __syncthreads();
    }
  }
  if (p.every) add_ds(0);
  if (p.ds0) d.store(p.ds0 + at.bh * N * N);
}

template <int N>
void run(const Wkv7& p, unsigned half, void* stream) {
  using T = Back<N>;
  constexpr int64_t SHARED = 4 * N * (CHUNK * INPUTS + T::GROUP * T::THREADS / 32 * SUMS);
  if (p.back) launch(backward<N>, p.B * p.H, T::THREADS, SHARED, stream, p, half);
  else launch(forward<N>, p.B * p.H, 2 * N, 4 * Forward<N>::SHARED, stream, p, half);
}

}  // namespace

void wkv7(const Call& call) {
  const auto p = call.as<Wkv7>(6);
  unsigned half = 0;
  for (size_t i = 0; i < call.half.size(); ++i) half |= static_cast<unsigned>(call.half[i]) << i;
  void* stream = reinterpret_cast<void*>(call.numbers[6]);
  if (wkv7_bf16(p, half, stream)) return;
  switch (p.N) {
    case 16: return run<16>(p, half, stream);
    case 32: return run<32>(p, half, stream);
    case 64: return run<64>(p, half, stream);
    case 128: return run<128>(p, half, stream);
  }
}
