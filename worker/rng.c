// rng.c: torch's random normals, rebuilt from their definitions, because the start noise decides the picture.
//
// What depends on the implementation and is followed here: the order of draws, the redrawn tail, the intermediate
// roundings, and the polynomials with fused multiply-adds that torch's AVX2 code takes for log, sine and cosine.
#include "worker/rng.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>
#include <sys/random.h>

// ---- Mersenne twister MT19937 (Matsumoto and Nishimura 1998)

enum { MT_N = 624, MT_M = 397, BLOCK = 16, HALF_BLOCK = 8 };

struct mt {
    uint32_t state[MT_N];
    uint32_t words[MT_N]; // what the state gives
    int next;             // index of the next word; MT_N: the state must be advanced first
};

static void mt_seed(struct mt *mt, uint32_t seed)
{
    mt->state[0] = seed;
    for (uint32_t i = 1; i < MT_N; i++)
        mt->state[i] = 1812433253u * (mt->state[i - 1] ^ (mt->state[i - 1] >> 30)) + i;
    mt->next = MT_N;
}

static uint32_t mt_twist(uint32_t a, uint32_t b)
{
    const uint32_t y = (a & 0x80000000u) | (b & 0x7fffffffu);
    return (y >> 1) ^ (0x9908b0dfu & -(y & 1u));
}

static void mt_advance(struct mt *mt)
{
    uint32_t *s = mt->state;
    for (int i = 0; i < MT_N - MT_M; i++)
        s[i] = s[i + MT_M] ^ mt_twist(s[i], s[i + 1]);
    for (int i = MT_N - MT_M; i < MT_N - 1; i++)
        s[i] = s[i + MT_M - MT_N] ^ mt_twist(s[i], s[i + 1]);
    s[MT_N - 1] = s[MT_M - 1] ^ mt_twist(s[MT_N - 1], s[0]);
    for (int i = 0; i < MT_N; i++) {
        uint32_t y = s[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        mt->words[i] = y ^ (y >> 18);
    }
    mt->next = 0;
}

static uint32_t mt_draw(struct mt *mt)
{
    if (mt->next == MT_N)
        mt_advance(mt);
    return mt->words[mt->next++];
}

static double mt_uniform53(struct mt *mt)
{
    uint64_t high = mt_draw(mt);
    uint64_t bits = (high << 32) | mt_draw(mt);
    return (double)(bits & ((UINT64_C(1) << 53) - 1)) * 0x1p-53;
}

// ---- number formats

static float f32_identity(float x)
{
    return x;
}

static float f32_to_bf16(float x) // to nearest, ties to even; x is finite
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

static float f32_to_f16(float x) // to nearest, ties to even; |x| < 65504
{
    int exponent;
    frexpf(x, &exponent);                                             // |x| in [2^(exponent-1), 2^exponent)
    float ulp = ldexpf(1.0f, (exponent < -13 ? -13 : exponent) - 11); // below 2^-14: subnormal, steps of 2^-24
    return rintf(x / ulp) * ulp;
}

// ---- log, sine and cosine as torch's AVX2 code has them: Cephes polynomials in float32, multiply-adds fused

static float cephes_logf(float x) // x > 0, normal
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    float e = (float)((int)(bits >> 23) - 126);
    bits = (bits & 0x007fffffu) | 0x3f000000u; // as frexpf: x in [1/2, 1)
    memcpy(&x, &bits, sizeof x);
    const bool low = x < 0.707106781186547524f;
    e = low ? e - 1 : e;
    x = low ? x - 1 + x : x - 1;
    float z = x * x;
    float y = fmaf(7.0376836292E-2f, x, -1.1514610310E-1f);
    y = fmaf(y, x, 1.1676998740E-1f);
    y = fmaf(y, x, -1.2420140846E-1f);
    y = fmaf(y, x, 1.4249322787E-1f);
    y = fmaf(y, x, -1.6668057665E-1f);
    y = fmaf(y, x, 2.0000714765E-1f);
    y = fmaf(y, x, -2.4999993993E-1f);
    y = fmaf(y, x, 3.3333331174E-1f);
    y = fmaf(y * x, z, e * -2.12194440e-4f);
    y = fmaf(z, -0.5f, y);
    return fmaf(e, 0.693359375f, x + y);
}

static void cephes_sincosf(float x, float *sine, float *cosine) // 0 <= x < 8192
{
    int octant = ((int)(x * 1.27323954473516f) + 1) & ~1; // 4 / pi
    float j = (float)octant;
    x = fmaf(j, -0.78515625f, x); // pi / 4 in three parts
    x = fmaf(j, -2.4187564849853515625e-4f, x);
    x = fmaf(j, -3.77489497744594108e-8f, x);
    float z = x * x;
    float c = fmaf(2.443315711809948E-005f, z, -1.388731625493765E-003f);
    c = fmaf(c, z, 4.166664568298827E-002f);
    c = fmaf(c * z, z, -0.5f * z) + 1;
    float s = fmaf(-1.9515295891E-4f, z, 8.3321608736E-3f);
    s = fmaf(s, z, -1.6666654611E-1f);
    s = fmaf(s * z, x, x);
    bool swap = (octant & 2) != 0;
    *sine = (octant & 4 ? -1.0f : 1.0f) * (swap ? c : s);
    *cosine = ((octant - 2) & 4 ? 1.0f : -1.0f) * (swap ? s : c);
}

// ---- CPU normals

// Box-Muller on one block of 16 uniforms in [0, 1): element j pairs with element j + 8.
static void box_muller(float u[BLOCK])
{
    for (int j = 0; j < HALF_BLOCK; j++) {
        float radius = sqrtf(-2.0f * cephes_logf(1 - u[j])), s, c;
        cephes_sincosf(6.283185307179586f * u[j + HALF_BLOCK], &s, &c);
        u[j] = radius * c;
        u[j + HALF_BLOCK] = radius * s;
    }
}

// The same with every result rounded to a narrow type, as torch did up to 2.12.
static void box_muller_rounding(float u[BLOCK], float (*narrow)(float))
{
    for (int j = 0; j < HALF_BLOCK; j++) {
        float radius = narrow(sqrtf(-2.0f * narrow(logf(narrow(1 - u[j])))));
        float theta = narrow((float)(2 * M_PI * (double)u[j + HALF_BLOCK]));
        u[j] = narrow(radius * narrow(cosf(theta)));
        u[j + HALF_BLOCK] = narrow(radius * narrow(sinf(theta)));
    }
}

static void uniforms(struct mt *mt, int bits, float *out, int64_t n)
{
    const float unit = ldexpf(1, -bits);
    const uint32_t mask = (1u << bits) - 1;
    while (n > 0) {
        if (mt->next == MT_N)
            mt_advance(mt);
        const int64_t left = MT_N - mt->next, some = n < left ? n : left;
        for (int64_t i = 0; i < some; i++)
            out[i] = (float)(int32_t)(mt->words[mt->next + i] & mask) * unit; // below 2^24: exact
        mt->next += (int)some;
        out += some;
        n -= some;
    }
}

// What tells the CPU kinds apart. rounding is the type of the result, each_step whether every operation rounds to it.
struct cpu_kind {
    float (*rounding)(float);
    int uniform_bits;
    bool each_step;
    bool tail_drawn_twice; // n % 16 uniforms are drawn, and thrown away, before the 16 of the last block
};

static const struct cpu_kind cpu_kinds[RNG_KINDS] = {
    [RNG_CPU_F32] = {f32_identity, 24, false, true},         [RNG_CPU_BF16] = {f32_to_bf16, 24, false, false},
    [RNG_CPU_F16] = {f32_to_f16, 24, false, false},          [RNG_CPU_BF16_TORCH_2_12] = {f32_to_bf16, 8, true, true},
    [RNG_CPU_F16_TORCH_2_12] = {f32_to_f16, 11, true, true},
};

static void cpu_block(const struct cpu_kind *kind, struct mt *mt, float *out)
{
    uniforms(mt, kind->uniform_bits, out, BLOCK);
    if (kind->each_step)
        box_muller_rounding(out, kind->rounding);
    else
        box_muller(out);
    for (int i = 0; i < BLOCK; i++)
        out[i] = kind->rounding(out[i]);
}

// Fewer than 16: one pair at a time, in double.
static void cpu_few(const struct cpu_kind *kind, struct mt *mt, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += 2) {
        double theta = 2 * M_PI * mt_uniform53(mt);
        double radius = sqrt(-2 * log1p(-mt_uniform53(mt)));
        out[i] = kind->rounding((float)(radius * cos(theta)));
        if (i + 1 < n)
            out[i + 1] = kind->rounding((float)(radius * sin(theta)));
    }
}

static void cpu_randn(const struct cpu_kind *kind, uint32_t seed, float *out, int64_t n)
{
    struct mt mt;
    mt_seed(&mt, seed);
    if (n < BLOCK) {
        cpu_few(kind, &mt, out, n);
        return;
    }
    int64_t tail = n % BLOCK;
    for (int64_t i = 0; i < n - tail; i += BLOCK)
        cpu_block(kind, &mt, out + i);
    if (tail == 0)
        return;
    if (kind->tail_drawn_twice)
        uniforms(&mt, kind->uniform_bits, out + n - tail, tail);
    cpu_block(kind, &mt, out + n - BLOCK); // the last 16, redone over the end of the block before
}

// ---- CUDA normals

void rng_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    uint32_t k[2] = {key[0], key[1]};
    for (int round = 0; round < 10; round++) {
        uint64_t a = UINT64_C(0xD2511F53) * c[0], b = UINT64_C(0xCD9E8D57) * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k[1],
                            (uint32_t)a};
        memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    memcpy(out, c, sizeof c);
}

// Thread t of T makes elements t, t + T, t + 2T and t + 3T from one Philox block, then those 4T further on from the
// next: counter (block, 0, t, 0), key the seed.
static void cuda_randn(uint64_t seed, int sm_count, float *out, int64_t n)
{
    enum { CUDA_BLOCK = 256, BLOCKS_PER_SM = 8 };
    int64_t blocks = (n + CUDA_BLOCK - 1) / CUDA_BLOCK, resident = (int64_t)sm_count * BLOCKS_PER_SM;
    int64_t threads = CUDA_BLOCK * (blocks < resident ? blocks : resident);
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int64_t base = 0; base < n; base += 4 * threads)
        for (int64_t thread = 0; thread < threads && base + thread < n; thread++) {
            uint32_t counter[4] = {(uint32_t)(base / (4 * threads)), 0, (uint32_t)thread, 0}, bits[4];
            rng_philox4x32(counter, key, bits);
            for (int lane = 0; lane < 4; lane++) {
                int64_t i = base + lane * threads + thread;
                if (i >= n)
                    break;
                const uint32_t *pair = bits + (lane & 2);
                float u = fmaf((float)pair[0], 0x1p-32f, 0x1p-33f);
                float v = fmaf((float)pair[1], 0x1p-32f * 6.2831855f, 0x1p-33f * 6.2831855f);
                out[i] = sqrtf(-2.0f * logf(u)) * (lane & 1 ? cosf(v) : sinf(v));
            }
        }
}

int rng_randn(enum rng_kind kind, uint64_t seed, int sm_count, float *out, int64_t n, struct err *e)
{
    if ((unsigned)kind >= RNG_KINDS)
        return err_set(e, ERR_INVALID, "rng: unknown generator %d", (int)kind);
    if (n < 0)
        return err_set(e, ERR_INVALID, "rng: cannot draw %lld numbers", (long long)n);
    if (kind != RNG_CUDA) {
        cpu_randn(&cpu_kinds[kind], (uint32_t)seed, out, n);
        return 0;
    }
    if (sm_count < 1)
        return err_set(e, ERR_INVALID, "rng: sm_count is %d; the cuda generator needs at least 1", sm_count);
    if (n > INT32_MAX)
        return err_set(e, ERR_INVALID, "rng: the cuda generator draws up to 2147483647 numbers, not %lld",
                       (long long)n);
    cuda_randn(seed, sm_count, out, n);
    return 0;
}

int rng_fresh_seed(uint64_t *seed, struct err *e)
{
    ssize_t got;
    do
        got = getrandom(seed, sizeof *seed, 0);
    while (got < 0 && errno == EINTR);
    if (got != (ssize_t)sizeof *seed)
        return err_set(e, ERR_IO, "no random seed from the system: getrandom gave %zd of %zu bytes", got, sizeof *seed);
    return 0;
}
