// The kernels as one torch operator that writes into buffers of the caller, through torch's stable ABI: its
// headers compile in a second, where torch/extension.h takes half a minute, and every further operator would
// take half a second. Shapes, dtypes, fakes and gradients are the business of the Python side.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>
#include "kernels.h"

namespace {

#ifdef DEVICE  // the .cu kernels, a library of its own for tensors on this device
#define LIBRARY nanodir_cuda
constexpr struct { const char* name; void (*kernel)(const Call&); } KERNELS[] =
    {{"wkv7", wkv7}, {"biwkv", biwkv}};
#else
#define LIBRARY nanodir_kernel
#define DEVICE CPU
constexpr auto& KERNELS = CPU_KERNELS;
#endif

// An empty tensor stands for None. The name comes as a handle, which is to be freed: torch's conversion to
// std::string (2.11, 2.13) loses 32 bytes a call, and such holes kept the heap from ever being whole again.
void run(StringHandle name, std::vector<int64_t> numbers, double eps,
         std::vector<torch::stable::Tensor> tensors) {
  const char* text;
  STD_TORCH_CHECK(!torch_string_c_str(name, &text), "a name cannot be read");
  const auto row = std::find_if(std::begin(KERNELS), std::end(KERNELS),
                                [&](const auto& row) { return !std::strcmp(text, row.name); });
  torch_delete_string(name);
  STD_TORCH_CHECK(row != std::end(KERNELS), "there is no kernel of this name");
  Call call{numbers.data(), eps, {}, {}};
  for (const auto& x : tensors) {
    call.buffers.push_back(x.numel() ? static_cast<float*>(x.data_ptr()) : nullptr);
    call.half.push_back(x.scalar_type() == torch::headeronly::ScalarType::BFloat16);
  }
  row->kernel(call);
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, n, grain, f);
}

STABLE_TORCH_LIBRARY_FRAGMENT(LIBRARY, m) {
  m.def("run(str name, int[] numbers, float eps, Tensor(a!)[] tensors) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(LIBRARY, DEVICE, m) { m.impl("run", TORCH_BOX(&run)); }
