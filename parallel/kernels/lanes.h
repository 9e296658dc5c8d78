/* As many floats at a time as a register of the processor holds, by the vector extension of gcc and
   clang: the compiler picks the instructions, and puts wider vectors on the stack. Sums keep one
   fixed order: on one kind of processor, results depend on shapes only. */
#ifndef LANES_H
#define LANES_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define BYTES (4 * LANES)
#define INLINE static inline __attribute__((always_inline))
typedef float lanes __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(BYTES)));

INLINE lanes all(float value) { return (lanes){0} + value; }
INLINE lanes load(const float *at) { return *(const loose *)at; }
INLINE void store(float *at, lanes value) { *(loose *)at = value; }

/* The first n lanes, the rest zero. */
INLINE lanes load_some(const float *at, long n) {
    if (n >= LANES) return load(at);
#ifdef __AVX512F__
    return (lanes)_mm512_maskz_loadu_ps((1u << n) - 1, at);
#else
    lanes value = {0};
    if (n == LANES / 2) memcpy(&value, at, BYTES / 2);
    else for (long i = 0; i < n; i++) value[i] = at[i];
    return value;
#endif
}
INLINE void store_some(float *at, lanes value, long n) {
    if (n >= LANES) { store(at, value); return; }
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(at, (1u << n) - 1, (__m512)value);
#else
    if (n == LANES / 2) memcpy(at, &value, BYTES / 2);
    else for (long i = 0; i < n; i++) at[i] = value[i];
#endif
}
typedef float four __attribute__((vector_size(16)));
INLINE float total(lanes v) {
    four sum = __builtin_shufflevector(v, v, 0, 1, 2, 3);
#if LANES >= 8
    sum += __builtin_shufflevector(v, v, 4, 5, 6, 7);
#endif
#if LANES >= 16
    sum += __builtin_shufflevector(v, v, 8, 9, 10, 11);
    sum += __builtin_shufflevector(v, v, 12, 13, 14, 15);
#endif
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
INLINE lanes choose(bits mask, lanes yes, lanes no) {
    return (lanes)(((bits)yes & mask) | ((bits)no & ~mask));
}
/* 1 / x to one unit in the last place, for finite x >= 1; NaN stays NaN. A true division takes
   sixteen cycles, which is a third of a GELU. */
INLINE lanes inverse(lanes x) {
#ifdef __AVX512F__
    lanes guess = (lanes)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#elif defined(__AVX__)
    lanes guess = (lanes)_mm256_rcp_ps((__m256)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}
/* e^x for x <= 0, relative error below 2e-7; NaN stays NaN, below -87 it is 1e-38. */
INLINE lanes exp_negative(lanes x) {
    x = choose((bits)(x < all(-87.0f)), all(-87.0f), x);
    lanes shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    lanes whole = shifted - 12582912.0f;
    lanes rest = x - whole * 0.693145752f;
    rest = rest - whole * 1.42860677e-6f;
    lanes sum = all(1.0f / 720) * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    bits power = ((bits)shifted - (bits)all(12582912.0f)) << 23;
    return (lanes)((bits)sum + power);
}

/* Runs work(arg, 0 .. tasks-1). Which thread takes which task changes no result.
   One thread never enters a parallel region: a forked child may not. */
typedef void (*work_t)(const void *arg, long task);
void run_tasks(work_t work, const void *arg, long tasks, int threads);
#endif
