// What kernels.c, attention.c and packed.c share: inner loops of the modules of the same names, for
// CPUs, which do in one pass over memory what takes PyTorch's operations several. compile.py
// compiles them.
//
// A tensor is a pointer and `half`: 1 for bf16, 0 for fp32. Rows are widened to fp32 in buffers
// that stay in the first-level cache, computed with there, and rounded once, when they are stored.
#pragma once
#include <stdint.h>

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#define INLINE static inline __attribute__((always_inline))
#define WORTH_THREADS(elements) if ((elements) > 1 << 15)
#define BYTES(half) ((half) ? 2 : 4)
#define AT(tensor, half, index) ((char *)(tensor) + BYTES(half) * (index))

typedef union { float value; uint32_t bits; } word;

INLINE float widen(uint16_t x) { return ((word){.bits = (uint32_t)x << 16}).value; }

INLINE uint16_t narrow(float x) {
    uint32_t bits = ((word){x}).bits,
             rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;  // NaN stays NaN
}

INLINE float element(const void *x, int half, long i) {
    return half ? widen(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void load(float *to, const void *from, int half, long n) {
    if (half)
        for (long i = 0; i < n; i++) to[i] = widen(((const uint16_t *)from)[i]);
    else
        for (long i = 0; i < n; i++) to[i] = ((const float *)from)[i];
}

INLINE void store(void *to, const float *from, int half, long n) {
    if (half)
        for (long i = 0; i < n; i++) ((uint16_t *)to)[i] = narrow(from[i]);
    else
        for (long i = 0; i < n; i++) ((float *)to)[i] = from[i];
}

// e^x to about 5 units in the last place, without a branch, so that loops over it become vector
// instructions (Cephes' expf).
INLINE float exponential(float x) {
    float clamped = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(clamped * 1.44269504f);
    float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    word power = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * power.value;
}
