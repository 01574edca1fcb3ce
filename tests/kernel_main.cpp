// One call of a CPU kernel as a program, so that kernels for another processor can be run by an emulator of it, without its torch.
// kernel_main NAME < call > buffers: 8-byte words count, numbers; eps; count, then for each buffer bytes, whether bfloat16, contents.
#include <cstdio>
#include <cstring>
#include "../wkv_cuda/kernels.h"

void parallel_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& f) { f(0, n); }

namespace {

template <class T>
T word() {
  T x;
  if (std::fread(&x, 8, 1, stdin) != 1) std::exit(3);
  return x;
}

}  // namespace

int main(int, char** argv) {
  std::vector<int64_t> numbers(word<int64_t>());
  for (int64_t& x : numbers) x = word<int64_t>();
  Call call{numbers.data(), word<double>(), {}, {}};
  std::vector<std::vector<char>> buffers(word<int64_t>());
  for (auto& x : buffers) {
    x.resize(word<int64_t>());
    call.half.push_back(word<int64_t>());
    if (!x.empty() && std::fread(x.data(), x.size(), 1, stdin) != 1) return 3;
    call.buffers.push_back(x.empty() ? nullptr : reinterpret_cast<float*>(x.data()));
  }
  for (const auto& row : CPU_KERNELS)
    if (!std::strcmp(row.name, argv[1])) row.kernel(call);
  for (const auto& x : buffers) std::fwrite(x.data(), 1, x.size(), stdout);
}
