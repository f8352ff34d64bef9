// Chooses the instruction set at run time. SF_HAVE_* say which tables build.py compiled.
#include <cstring>

#include "api.h"

#ifdef SF_HAVE_AVX2
namespace avx2 { extern const stepflash::Kernels KERNELS; }
#endif
#ifdef SF_HAVE_AVX512
namespace avx512 { extern const stepflash::Kernels KERNELS; }
#endif
#ifdef SF_HAVE_AVX512_BF16
namespace avx512_bf16 { extern const stepflash::Kernels KERNELS; }
#endif

namespace stepflash {

const Kernels* select_kernels(const char* limit) {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_dot = has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                       __builtin_cpu_supports("avx512bf16");
  const int level = limit == nullptr || *limit == 0 ? 3
                    : std::strcmp(limit, "avx2") == 0 ? 1
                    : std::strcmp(limit, "avx512") == 0 ? 2 : 3;
  (void)has_avx2, (void)has_dot, (void)level;
#ifdef SF_HAVE_AVX512_BF16
  if (has_dot && level >= 3) return &avx512_bf16::KERNELS;
#endif
#ifdef SF_HAVE_AVX512
  if (has_avx512 && level >= 2) return &avx512::KERNELS;
#endif
#ifdef SF_HAVE_AVX2
  if (has_avx2) return &avx2::KERNELS;
#endif
  return nullptr;
}

}  // namespace stepflash
