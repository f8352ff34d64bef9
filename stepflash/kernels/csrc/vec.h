// Sixteen lanes of float or int32, on AVX-512 or as two AVX2 registers.
//
// Every kernel is written once against these functions and compiled once per instruction set, inside the
// namespace SF_ISA (a compiler flag). Lanes are output rows or head dimensions, so that a result never
// depends on how many tokens are computed together: batching, chunking and speculation stay bit-identical.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define SF_NATIVE_DOT 1
#endif

namespace SF_ISA {

constexpr int LANES = 16;
#define SF_INLINE static inline __attribute__((always_inline))

// In front of loops over the rows or tokens of a tile, and over anything whose index picks one of several sums: gcc unrolls them too late
// by itself, when it has already decided that arrays of sums live in memory, where each step then waits for the one before it to be
// stored (int4_g64 for one token: 34 GB/s instead of 69, from the level-3 cache).
#define SF_UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX512F__)
struct vf { __m512 v; };
struct vi { __m512i v; };

SF_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
SF_INLINE vi set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
SF_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
SF_INLINE vi loadi(const void* p) { return {_mm512_loadu_si512(p)}; }
SF_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
SF_INLINE void storei(void* p, vi a) { _mm512_storeu_si512(p, a.v); }
SF_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
SF_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
SF_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
SF_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
SF_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
SF_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
SF_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
SF_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
SF_INLINE vi operator*(vi a, vi b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
SF_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
SF_INLINE vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> SF_INLINE vi shl(vi a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> SF_INLINE vi shr(vi a) { return {_mm512_srli_epi32(a.v, N)}; }  // logical
template <int N> SF_INLINE vi sar(vi a) { return {_mm512_srai_epi32(a.v, N)}; }  // arithmetic
SF_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
SF_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest even
SF_INLINE vf round(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SF_INLINE vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }
SF_INLINE vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
SF_INLINE float hsum(vf a) { return _mm512_reduce_add_ps(a.v); }
SF_INLINE float hmax(vf a) { return _mm512_reduce_max_ps(a.v); }
SF_INLINE int32_t hsumi(vi a) { return _mm512_reduce_add_epi32(a.v); }
SF_INLINE vf load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
SF_INLINE void store_f16(uint16_t* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SF_INLINE vi load_u16(const uint16_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
SF_INLINE vi load_s8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
SF_INLINE void store_u16(uint16_t* p, vi a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
SF_INLINE void store_s8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
SF_INLINE vf select_gt(vf a, vf b, vf yes, vf no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
#else
struct vf { __m256 a, b; };
struct vi { __m256i a, b; };

SF_INLINE vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SF_INLINE vi set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
SF_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SF_INLINE vi loadi(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SF_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
SF_INLINE void storei(void* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
#define SF_PAIR(type, name, op) \
  SF_INLINE type name(type x, type y) { return {op(x.a, y.a), op(x.b, y.b)}; }
SF_PAIR(vf, operator+, _mm256_add_ps)
SF_PAIR(vf, operator-, _mm256_sub_ps)
SF_PAIR(vf, operator*, _mm256_mul_ps)
SF_PAIR(vf, operator/, _mm256_div_ps)
SF_PAIR(vf, max, _mm256_max_ps)
SF_PAIR(vf, min, _mm256_min_ps)
SF_PAIR(vi, operator+, _mm256_add_epi32)
SF_PAIR(vi, operator*, _mm256_mullo_epi32)
SF_PAIR(vi, operator&, _mm256_and_si256)
SF_PAIR(vi, operator|, _mm256_or_si256)
#undef SF_PAIR
SF_INLINE vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
template <int N> SF_INLINE vi shl(vi x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> SF_INLINE vi shr(vi x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> SF_INLINE vi sar(vi x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
SF_INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SF_INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
SF_INLINE vf round(vf x) {
  constexpr int NEAREST_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, NEAREST_EVEN), _mm256_round_ps(x.b, NEAREST_EVEN)};
}
SF_INLINE vf as_float(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
SF_INLINE vi as_int(vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
SF_INLINE float hsum(vf x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
SF_INLINE float hmax(vf x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
SF_INLINE int32_t hsumi(vi x) {
  int32_t lanes[16], total = 0;
  storei(lanes, x);
  for (int lane = 0; lane < 16; ++lane) total += lanes[lane];
  return total;
}
SF_INLINE vf load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
SF_INLINE void store_f16(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SF_INLINE vi load_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
SF_INLINE vi load_s8(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
SF_INLINE void store_u16(uint16_t* p, vi x) {
  int32_t lanes[16];
  storei(lanes, x);
  for (int lane = 0; lane < 16; ++lane) p[lane] = (uint16_t)lanes[lane];
}
SF_INLINE void store_s8(int8_t* p, vi x) {
  int32_t lanes[16];
  storei(lanes, x);
  for (int lane = 0; lane < 16; ++lane) p[lane] = (int8_t)lanes[lane];
}
SF_INLINE vf select_gt(vf x, vf y, vf yes, vf no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
#endif

SF_INLINE vf zero() { return set1(0.0f); }
SF_INLINE float bf16_to_float(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
SF_INLINE uint16_t float_to_bf16(float x) {  // nearest even, as torch; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
SF_INLINE vf load_bf16(const uint16_t* p) { return as_float(shl<16>(load_u16(p))); }
// Nearest even as float_to_bf16, without its care for NaN (a NaN of torch rounds to a NaN here as well).
SF_INLINE vi round_bf16(vf x) {
  vi bits = as_int(x);
  return shr<16>(bits + set1i(0x7fff) + (shr<16>(bits) & set1i(1)));
}
SF_INLINE void store_bf16(uint16_t* p, vf x) { store_u16(p, round_bf16(x)); }

// acc[lane] += sum over 4 bytes of u8 weight * s8 activation; exact.
SF_INLINE vi dot4(vi acc, vi weight, vi activation) {
#if defined(SF_NATIVE_DOT)
  return {_mm512_dpbusd_epi32(acc.v, weight.v, activation.v)};
#elif defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi16(0xff);
  __m512i even = _mm512_madd_epi16(_mm512_and_si512(weight.v, low),
                                   _mm512_srai_epi16(_mm512_slli_epi16(activation.v, 8), 8));
  __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(weight.v, 8), _mm512_srai_epi16(activation.v, 8));
  return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
#else
  const __m256i low = _mm256_set1_epi16(0xff);
  auto half = [&](__m256i c, __m256i w, __m256i x) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
  };
  return {half(acc.a, weight.a, activation.a), half(acc.b, weight.b, activation.b)};
#endif
}

// acc[lane] += w[2 lane] * x[2 lane] + w[2 lane + 1] * x[2 lane + 1], pairs of bf16.
SF_INLINE vf dot2(vf acc, vi weight, vi activation) {
#if defined(SF_NATIVE_DOT)
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)weight.v, (__m512bh)activation.v)};
#else
  const vi high = set1i((int32_t)0xffff0000);
  acc = fma(as_float(shl<16>(weight)), as_float(shl<16>(activation)), acc);
  return fma(as_float(weight & high), as_float(activation & high), acc);
#endif
}

// exp by 2^n * polynomial (Cephes expf), relative error below 2e-7 for x in [-87, 88]; clamps outside.
SF_INLINE vf exp(vf x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  vi n = to_int(x * set1(1.44269504f));
  vf nf = to_float(n);
  vf r = fma(nf, set1(-0.693359375f), x);
  r = fma(nf, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return p * as_float(shl<23>(n + set1i(127)));
}

SF_INLINE vf sigmoid(vf x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

}  // namespace SF_ISA
