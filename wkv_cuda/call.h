// What Python hands a kernel, on the CPU and on the GPU alike.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// A kernel takes numbers and buffers in the order in which the Python modules give them to `call`; a buffer
// that it need neither read nor write is null, as are those that the list ends before. Its struct names them:
// members of eight bytes, numbers before buffers.
struct Call {
  const int64_t* numbers;
  double eps;
  std::vector<float*> buffers;
  std::vector<bool> half;                  // which buffers hold bfloat16

  template <class P>
  P as(int64_t count) const {              // the first `count` members of P are numbers
    P p{};
    std::memcpy(static_cast<void*>(&p), numbers, 8 * count);
    std::memcpy(reinterpret_cast<char*>(&p) + 8 * count, buffers.data(),
                std::min(sizeof p - 8 * count, 8 * buffers.size()));
    return p;
  }
};

void wkv7(const Call&);
void biwkv(const Call&);

// The recurrence of RWKV-7: (B,T,H,N) but where said otherwise.
struct Wkv7 {
  int64_t B, T, H, N, every, back;
  const float *r, *w, *k, *v, *a, *b, *s0, *c;
  float *y, *s, *mid, *sa;  // mid (B,H,ceil(T/16),N,N) and sa (B,T,H,N): what backward needs
  const float *dy, *ds;                                  // from here on backward only
  float *dr, *dw, *dk, *dv, *da, *db, *ds0, *dc;
  constexpr int64_t states() const { return every ? T / every + 1 : 1; }
};

constexpr int CHUNK = 16;   // tokens between two saved states; backward recomputes the states in between

// The bidirectional WKV. w, u: (B,C), the rest (B,T,C). scale and inv hold e^scale * inv = 1 / denominator,
// which backward needs.
struct BiWkv {
  int64_t B, T, C, back;
  const float *w, *u, *k, *v;
  float *y, *scale, *inv;
  const float *dy;                                       // from here on backward only
  float *dw, *du, *dk, *dv;
};

// reference of an empty sum: finite, so that no difference of two references is inf - inf
constexpr float LOWEST = -1e30f;
constexpr float SLACK = 16;
