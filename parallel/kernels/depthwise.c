/* y = a + bias + depthwise 5x5 of a on channels-last images, a = x or gelu(x), and its gradients.

   A task is one image and one slice of channels: it walks down the rows with five of them, padded
   with zeros, in a ring that stays in the cache. Within the ring, taps and sums, LANES channels lie
   together for all columns or taps, so that what one pass reads is contiguous. y and its gradient
   may lie as four phase grids. */
#include "lanes.h"

enum { K = 5, PAD = 2, SLICE = 64, TAPS = 25, PIXELS = 4 };
/* Kernel rows whose gradients are summed together: their K sums each, PIXELS and a few more stay in
   registers. */
enum { TOGETHER = LANES == 16 ? 3 : 2 };

typedef struct {
    const float *x, *weight, *bias, *grad; /* weight (C, 25) */
    float *y, *grad_x, *parts;             /* parts (B, 26, C): of the weight, then the bias */
    long images, height, width, channels;
    int gelu, split;
} mix_t;

/* Where pixel (row, column) of an image of H x W pixels stands among its pixels. */
INLINE long place(const mix_t *m, int split, long row, long column) {
    if (!split) return row * m->width + column;
    long quarter = (m->height / 2) * (m->width / 2);
    return ((row & 1) * 2 + (column & 1)) * quarter + (row / 2) * (m->width / 2) + column / 2;
}

/* Phi(x) and, where asked, x * phi(x). Source: Abramowitz and Stegun 7.1.26 (1.5e-7 absolute),
   the tail of each sign by itself so that nothing cancels. */
INLINE lanes normal_share(lanes x, lanes *slope) {
    bits negative = (bits)(x < all(0.0f));
    lanes size = choose(negative, -x, x) * 0.70710678f;
    lanes bell = exp_negative(-size * size);
    lanes t = inverse(1.0f + 0.3275911f * size);
    lanes sum = all(1.061405429f) * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    lanes tail = 0.5f * sum * t * bell;
    *slope = x * bell * 0.39894228f;
    return choose(negative, tail, 1.0f - tail);
}

/* Row `row` of one slice into its padded place in a ring; zeros outside the image. */
INLINE void fill(const mix_t *m, float *ring, const float *from, int split, long row, long image,
                 long first, long count, int gelu, float *slopes) {
    long across = m->width + 2 * PAD, slot = ((row + K) % K) * across * SLICE;
    if (row < 0 || row >= m->height) {
        memset(ring + slot, 0, sizeof(float) * across * SLICE);
        return;
    }
    from += image * m->height * m->width * m->channels + first;
    long below = row + 1 < m->height ? row + 1 : row;
    for (long column = 0; column < m->width; column++) {
        const float *at = from + place(m, split, row, column) * m->channels;
        /* perf: the next row is on its way while this one is worked on, a cache line a time */
        const float *next = from + place(m, split, below, column) * m->channels;
        for (long c = 0; c < count; c += 16) __builtin_prefetch(next + c);
        for (long c = 0; c < count; c += LANES) {
            long to = slot + c * across + (PAD + column) * LANES;
            lanes v = load_some(at + c, count - c);
            if (gelu) {
                lanes slope, share = normal_share(v, &slope);
                if (slopes) store(slopes + to, share + slope);
                v = v * share;
            }
            store(ring + to, v);
        }
    }
}

/* perf: a row of the result is brought in, to be written, while the ring is filled: 0.75 of the
   time, forward and backward of all shapes of a U-DiT-S step on AVX-512. */
INLINE void fetch(const mix_t *m, const float *out, int split, long row, long count) {
    for (long column = 0; column < m->width; column++)
        for (long c = 0; c < count; c += 16)
            __builtin_prefetch(out + place(m, split, row, column) * m->channels + c, 1);
}

/* n pixels at once, as many as leave registers for a row of taps: each input is loaded once a row. */
INLINE void sums(const int n, const float *const rows[K], long at, const float *taps, lanes bias,
                 lanes *out) {
    for (int p = 0; p < n; p++) out[p] = bias;
#pragma GCC unroll 5
    for (int i = 0; i < K; i++) {
        lanes tap[K];
#pragma GCC unroll 5
        for (int j = 0; j < K; j++) tap[j] = load(taps + (i * K + j) * LANES);
#pragma GCC unroll 12
        for (int q = 0; q < n + K - 1; q++) {
            lanes in = load(rows[i] + at + q * LANES);
#pragma GCC unroll 5
            for (int j = 0; j < K; j++)
                if (q - j >= 0 && q - j < n) out[q - j] += tap[j] * in;
        }
    }
}

/* One row of the mixture: centre + sums, times slopes where given, to the output. */
INLINE void mix_some(const int n, const mix_t *m, const float *const rows[K], const float *taps,
                     lanes bias, const float *slopes, float *out, int split, long row, long column,
                     long c, long count) {
    lanes sum[8];
    long at = c * (m->width + 2 * PAD) + column * LANES;
    sums(n, rows, at, taps + c * TAPS, bias, sum);
    for (int p = 0; p < n; p++) {
        lanes value = load(rows[PAD] + at + (p + PAD) * LANES) + sum[p];
        if (slopes) value = value * load(slopes + at + (p + PAD) * LANES);
        store_some(out + place(m, split, row, column + p) * m->channels + c, value, count - c);
    }
}

INLINE void mix_row(const mix_t *m, const float *const rows[K], const float *taps,
                    const float *bias, const float *slopes, float *out, int split, long row,
                    long count) {
    for (long c = 0; c < count; c += LANES) {
        lanes start = load(bias + c);
        long w = 0;
        for (; w + 8 <= m->width; w += 8)
            mix_some(8, m, rows, taps, start, slopes, out, split, row, w, c, count);
        for (; w + 4 <= m->width; w += 4)
            mix_some(4, m, rows, taps, start, slopes, out, split, row, w, c, count);
        for (; w < m->width; w++)
            mix_some(1, m, rows, taps, start, slopes, out, split, row, w, c, count);
    }
}

/* Gradients of the taps of n kernel rows from `many` pixels of one image row, added to sum (n, K). */
INLINE void weigh(const int n, const int many, const float *const *rows, const float *grads, long at,
                  lanes *sum) {
    lanes g[PIXELS];
#pragma GCC unroll 8
    for (int p = 0; p < many; p++) g[p] = load(grads + at + (PAD + p) * LANES);
#pragma GCC unroll 5
    for (int i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int q = 0; q < many + K - 1; q++) {
            lanes in = load(rows[i] + at + q * LANES);
#pragma GCC unroll 5
            for (int j = 0; j < K; j++)
                if (q - j >= 0 && q - j < many) sum[i * K + j] += g[q - j] * in;
        }
}

/* The same of a whole image row, added to `to` (n, K, LANES). */
INLINE void weigh_rows(const int n, const mix_t *m, const float *const *rows, const float *grads,
                       float *to, long c) {
    lanes sum[K * K];
#pragma GCC unroll 25
    for (int t = 0; t < n * K; t++) sum[t] = load(to + t * LANES);
    long w = 0, at = c * (m->width + 2 * PAD);
    for (; w + PIXELS <= m->width; w += PIXELS) weigh(n, PIXELS, rows, grads, at + w * LANES, sum);
    for (; w < m->width; w++) weigh(n, 1, rows, grads, at + w * LANES, sum);
#pragma GCC unroll 25
    for (int t = 0; t < n * K; t++) store(to + t * LANES, sum[t]);
}

/* Gradients of the taps and of the bias from one row, added to `to` (SLICE / LANES, 26, LANES). */
INLINE void weigh_row(const mix_t *m, const float *const rows[K], const float *grads, float *to,
                      long count) {
    for (long c = 0; c < count; c += LANES, to += (TAPS + 1) * LANES) {
        int i = 0;
#pragma GCC unroll 5
        for (; i + TOGETHER <= K; i += TOGETHER)
            weigh_rows(TOGETHER, m, rows + i, grads, to + i * K * LANES, c);
        if (i < K) weigh_rows(K % TOGETHER, m, rows + i, grads, to + i * K * LANES, c);
        lanes of_bias = load(to + TAPS * LANES);
        const float *row = grads + c * (m->width + 2 * PAD) + PAD * LANES;
        for (long w = 0; w < m->width; w++) of_bias += load(row + w * LANES);
        store(to + TAPS * LANES, of_bias);
    }
}

/* Where value t of channel c stands among `many` a channel. */
INLINE long among(long c, long t, long many) { return c / LANES * LANES * many + t * LANES + c % LANES; }

INLINE long slices(const mix_t *m) { return (m->channels + SLICE - 1) / SLICE; }

INLINE void window(const mix_t *m, const float *ring, long row, const float *rows[K]) {
    for (int i = 0; i < K; i++)
        rows[i] = ring + ((row + i - PAD + K) % K) * (m->width + 2 * PAD) * SLICE;
}

static float *clean(long floats) { return calloc(floats, sizeof(float)); }

INLINE void mix_forward(const mix_t *m, long task, const int gelu) {
    long image = task / slices(m), first = task % slices(m) * SLICE;
    long count = m->channels - first < SLICE ? m->channels - first : SLICE;
    long pixels = m->height * m->width;
    float taps[TAPS * SLICE] = {0}, bias[SLICE] = {0};
    for (long c = 0; c < count; c++) {
        bias[c] = m->bias[first + c];
        for (int t = 0; t < TAPS; t++)
            taps[among(c, t, TAPS)] = m->weight[(first + c) * TAPS + t];
    }
    float *ring = clean(K * (m->width + 2 * PAD) * SLICE);
    float *out = m->y + image * pixels * m->channels + first;
    for (long row = -PAD; row < PAD; row++)
        fill(m, ring, m->x, 0, row, image, first, count, gelu, NULL);
    for (long row = 0; row < m->height; row++) {
        const float *rows[K];
        fetch(m, out, m->split, row, count);
        fill(m, ring, m->x, 0, row + PAD, image, first, count, gelu, NULL);
        window(m, ring, row, rows);
        mix_row(m, rows, taps, bias, NULL, out, m->split, row, count);
    }
    free(ring);
}

INLINE void mix_backward(const mix_t *m, long task, const int gelu) {
    long image = task / slices(m), first = task % slices(m) * SLICE;
    long count = m->channels - first < SLICE ? m->channels - first : SLICE;
    long pixels = m->height * m->width, size = K * (m->width + 2 * PAD) * SLICE;
    float taps[TAPS * SLICE] = {0}, none[SLICE] = {0}, to[(TAPS + 1) * SLICE] = {0};
    for (long c = 0; c < count; c++)
        for (int t = 0; t < TAPS; t++)
            taps[among(c, t, TAPS)] = m->weight[(first + c) * TAPS + TAPS - 1 - t];
    float *ring = clean((gelu ? 3 : 2) * size), *grads = ring + size;
    float *slopes = gelu ? grads + size : NULL;
    float *out = m->grad_x + image * pixels * m->channels + first;
    for (long row = -PAD; row < PAD; row++) {
        fill(m, ring, m->x, 0, row, image, first, count, gelu, slopes);
        fill(m, grads, m->grad, m->split, row, image, first, count, 0, NULL);
    }
    for (long row = 0; row < m->height; row++) {
        const float *rows[K], *above[K], *slope[K];
        fetch(m, out, 0, row, count);
        fill(m, ring, m->x, 0, row + PAD, image, first, count, gelu, slopes);
        fill(m, grads, m->grad, m->split, row + PAD, image, first, count, 0, NULL);
        window(m, ring, row, rows);
        window(m, grads, row, above);
        if (gelu) window(m, slopes, row, slope);
        mix_row(m, above, taps, none, gelu ? slope[PAD] : NULL, out, 0, row, count);
        weigh_row(m, rows, above[PAD], to, count);
    }
    for (int t = 0; t <= TAPS; t++)
        for (long c = 0; c < count; c++)
            m->parts[(image * (TAPS + 1) + t) * m->channels + first + c] = to[among(c, t, TAPS + 1)];
    free(ring);
}

static void forward_plain(const void *m, long task) { mix_forward(m, task, 0); }
static void forward_gelu(const void *m, long task) { mix_forward(m, task, 1); }
static void backward_plain(const void *m, long task) { mix_backward(m, task, 0); }
static void backward_gelu(const void *m, long task) { mix_backward(m, task, 1); }

void mix5(const float *x, const float *weight, const float *bias, float *y, long images,
          long height, long width, long channels, int gelu, int split, int threads) {
    mix_t m = {x, weight, bias, NULL, y, NULL, NULL, images, height, width, channels, gelu, split};
    run_tasks(gelu ? forward_gelu : forward_plain, &m, images * slices(&m), threads);
}

/* grad_weight (C, 25), grad_bias (C): sums over images in their order. */
void mix5_backward(const float *grad, const float *x, const float *weight, float *grad_x,
                   float *grad_weight, float *grad_bias, float *parts, long images, long height,
                   long width, long channels, int gelu, int split, int threads) {
    mix_t m = {x, weight, NULL, grad, NULL, grad_x, parts, images, height, width, channels, gelu,
               split};
    run_tasks(gelu ? backward_gelu : backward_plain, &m, images * slices(&m), threads);
    for (int t = 0; t <= TAPS; t++)
        for (long c = 0; c < channels; c++) {
            float sum = 0;
            for (long b = 0; b < images; b++) sum += parts[(b * (TAPS + 1) + t) * channels + c];
            if (t < TAPS) grad_weight[c * TAPS + t] = sum;
            else grad_bias[c] = sum;
        }
}
