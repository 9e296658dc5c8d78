/* Cosine heads: turn adjacent channel pairs by the rotary table, bring each head to length one, and
   times the head's scale; and the gradient. A task is a run of ROWS token rows of (heads, size). */
#include <math.h>
#include "lanes.h"

enum { ROWS = 64, WIDEST = 512 }; /* WIDEST: channels of a head */

typedef struct {
    const float *x, *table, *scale, *grad; /* table (2, N, size): cosines; sines, -+ by channel */
    float *y, *grad_x, *parts;             /* parts (runs, heads) */
    long rows, tokens, heads, size;
} heads_t;

INLINE lanes swapped(lanes v) {
#if LANES == 16
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

INLINE long runs(const heads_t *h) { return (h->rows + ROWS - 1) / ROWS; }

/* The turned head into `to`; gives 1 / max(length, 1e-12). */
INLINE float turn(const heads_t *h, const float *x, const float *cosine, const float *sine,
                  lanes *to) {
    lanes square = {0};
    for (long c = 0, i = 0; c < h->size; c += LANES, i++) {
        long some = h->size - c;
        lanes v = load_some(x + c, some);
        v = v * load_some(cosine + c, some) + swapped(v) * load_some(sine + c, some);
        square += v * v;
        to[i] = v;
    }
    float length = sqrtf(total(square));
    return 1.0f / (length < 1e-12f ? 1e-12f : length);
}

static void forward(const void *arg, long task) {
    const heads_t *h = arg;
    long last = (task + 1) * ROWS < h->rows ? (task + 1) * ROWS : h->rows;
    lanes turned[WIDEST / LANES];
    for (long row = task * ROWS; row < last; row++) {
        const float *cosine = h->table + row % h->tokens * h->size;
        const float *sine = cosine + h->tokens * h->size;
        for (long head = 0; head < h->heads; head++) {
            long at = (row * h->heads + head) * h->size;
            float by = turn(h, h->x + at, cosine, sine, turned);
            if (h->scale) by *= h->scale[head];
            for (long c = 0, i = 0; c < h->size; c += LANES, i++)
                store_some(h->y + at + c, turned[i] * by, h->size - c);
        }
    }
}

static void backward(const void *arg, long task) {
    const heads_t *h = arg;
    long last = (task + 1) * ROWS < h->rows ? (task + 1) * ROWS : h->rows;
    lanes turned[WIDEST / LANES];
    float *part = h->parts + task * h->heads;
    memset(part, 0, sizeof(float) * h->heads);
    for (long row = task * ROWS; row < last; row++) {
        const float *cosine = h->table + row % h->tokens * h->size;
        const float *sine = cosine + h->tokens * h->size;
        for (long head = 0; head < h->heads; head++) {
            long at = (row * h->heads + head) * h->size;
            float by = turn(h, h->x + at, cosine, sine, turned);
            lanes sum = {0};
            for (long c = 0, i = 0; c < h->size; c += LANES, i++) {
                turned[i] *= by;
                sum += turned[i] * load_some(h->grad + at + c, h->size - c);
            }
            float along = total(sum);
            part[head] += along;
            float times = h->scale ? h->scale[head] * by : by;
            for (long c = 0, i = 0; c < h->size; c += LANES, i++) {
                long some = h->size - c;
                lanes g = (load_some(h->grad + at + c, some) - turned[i] * along) * times;
                /* turned back: the sines change sign, and the swap moves both */
                g = g * load_some(cosine + c, some) + swapped(g * load_some(sine + c, some));
                store_some(h->grad_x + at + c, g, some);
            }
        }
    }
}

/* scale: (heads) or NULL for ones. */
void cosine_heads(const float *x, const float *table, const float *scale, float *y, long rows,
                  long tokens, long heads, long size, int threads) {
    heads_t h = {x, table, scale, NULL, y, NULL, NULL, rows, tokens, heads, size};
    run_tasks(forward, &h, runs(&h), threads);
}

void cosine_heads_backward(const float *grad, const float *x, const float *table,
                           const float *scale, float *grad_x, float *grad_scale, float *parts,
                           long rows, long tokens, long heads, long size, int threads) {
    heads_t h = {x, table, scale, grad, NULL, grad_x, parts, rows, tokens, heads, size};
    run_tasks(backward, &h, runs(&h), threads);
    for (long head = 0; head < heads; head++) {
        float sum = 0;
        for (long r = 0; r < runs(&h); r++) sum += parts[r * heads + head];
        grad_scale[head] = sum;
    }
}
