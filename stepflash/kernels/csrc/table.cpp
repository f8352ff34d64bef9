// The table of one instruction set's kernels.
#include "api.h"

#define SF_TEXT_OF(x) #x
#define SF_TEXT(x) SF_TEXT_OF(x)

namespace SF_ISA {
using namespace stepflash;
void linear(const LinearArgs&);
void moe(const MoeArgs&);
void route(const RouteArgs&);
void rms_norm(const NormArgs&);
void qk_norm_rope(const RopeArgs&);
void cache_write(const CacheWriteArgs&);
void attention(const AttentionArgs&);
void network(const NetworkArgs* passes, int64_t count);
bool quantize(const QuantizeArgs&);
int64_t stream_read(const uint8_t*, int64_t, int);
extern const Kernels KERNELS;
const Kernels KERNELS = {SF_TEXT(SF_ISA), linear, moe, route, rms_norm, qk_norm_rope, cache_write, attention, network, quantize, stream_read};
}  // namespace SF_ISA
