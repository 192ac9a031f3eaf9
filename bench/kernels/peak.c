/* What the processor can do: multiply-adds on registers, nothing else. */
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
