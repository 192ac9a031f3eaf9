/* What the processor can do: multiply-adds on registers, nothing else. Loops over chains are unrolled
   by name: sums left in memory would be stored after every step, and the stores be what is timed. */
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

typedef float vector __attribute__((vector_size(sizeof(float) * LANES)));

/* Returns a sum, so that no compiler drops the loops. Does steps * 12 * LANES multiply-adds. */
float fma_loop(long steps) {
    vector sums[12], factor, addend;
    for (int lane = 0; lane < LANES; ++lane) {
        factor[lane] = 0.999f;
        addend[lane] = 0.001f;
    }
    for (int chain = 0; chain < 12; ++chain) sums[chain] = addend * (float)(chain + 1);
    for (long step = 0; step < steps; ++step)
        for (int chain = 0; chain < 12; ++chain) sums[chain] = sums[chain] * factor + addend;
    float total = 0;
    for (int chain = 0; chain < 12; ++chain)
        for (int lane = 0; lane < LANES; ++lane) total += sums[chain][lane];
    return total;
}

#ifdef __AVX512VNNI__
/* The same with bytes, summed in 32 bits. Does steps * 12 * 64 multiply-adds. */
float byte_loop(long steps) {
    __m512i sums[12], inputs = _mm512_set1_epi8(3), weights = _mm512_set1_epi8(5);
#pragma GCC unroll 12
    for (int chain = 0; chain < 12; ++chain) sums[chain] = _mm512_set1_epi32(chain);
    for (long step = 0; step < steps; ++step)
#pragma GCC unroll 12
        for (int chain = 0; chain < 12; ++chain)
            /* Volatile: a sum of products that never change would be worked out beforehand. */
            __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[chain]) : "v"(inputs), "v"(weights));
    float total = 0;
#pragma GCC unroll 12
    for (int chain = 0; chain < 12; ++chain) total += (float)_mm512_reduce_add_epi32(sums[chain]);
    return total;
}
#endif

#ifdef __AVX512BF16__
/* The same with bf16, summed in fp32. Does steps * 12 * 32 multiply-adds. */
float half_loop(long steps) {
    __m512 sums[12];
    __m512bh inputs = (__m512bh)_mm512_set1_epi16(0x3f80); /* 1 */
    __m512bh weights = (__m512bh)_mm512_set1_epi16(0x3c00); /* 2^-7 */
#pragma GCC unroll 12
    for (int chain = 0; chain < 12; ++chain) sums[chain] = _mm512_set1_ps((float)chain);
    for (long step = 0; step < steps; ++step)
#pragma GCC unroll 12
        for (int chain = 0; chain < 12; ++chain)
            sums[chain] = _mm512_dpbf16_ps(sums[chain], inputs, weights);
    float total = 0;
#pragma GCC unroll 12
    for (int chain = 0; chain < 12; ++chain) total += _mm512_reduce_add_ps(sums[chain]);
    return total;
}
#endif
