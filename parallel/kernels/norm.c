/* The residual gate and the modulated layer norm after it, on rows of channels, and their
   gradients.

   x1 = x + gate * out;  h = (x1 - mean) * rstd * (1 + scale) + shift. A task is a run of ROWS rows
   of one image. What `out` holds may lie as four phase grids. */
#include <math.h>
#include "lanes.h"

enum { ROWS = 64 };

typedef struct {
    const float *x, *out, *gate, *shift, *scale, *grad_x1, *grad_h, *mean_in, *rstd_in;
    float *x1, *h, *mean, *rstd, *grad_out, *grad_x, *parts; /* parts (B, runs, 3, C) */
    long images, tokens, channels, stride; /* stride: floats between images in gate, shift, scale */
    long grid;                             /* width of the image where out is in phases, else 0 */
    float eps;
} norm_t;

INLINE long runs(const norm_t *n) { return (n->tokens + ROWS - 1) / ROWS; }

INLINE long place(const norm_t *n, long token) {
    if (!n->grid) return token;
    long row = token / n->grid, column = token % n->grid;
    return ((row & 1) * 2 + (column & 1)) * (n->tokens / 4) + (row / 2) * (n->grid / 2) + column / 2;
}

static void norm_forward(const void *arg, long task) {
    const norm_t *n = arg;
    long image = task / runs(n), first = task % runs(n) * ROWS, size = n->channels;
    long last = first + ROWS < n->tokens ? first + ROWS : n->tokens;
    const float *gate = n->gate + image * n->stride, *shift = n->shift + image * n->stride;
    const float *scale = n->scale + image * n->stride;
    for (long token = first; token < last; token++) {
        long at = (image * n->tokens + token) * size;
        const float *x = n->x + at;
        lanes sum = {0};
        if (n->out) {
            const float *out = n->out + (image * n->tokens + place(n, token)) * size;
            float *x1 = n->x1 + at;
            for (long c = 0; c < size; c += LANES) {
                long some = size - c;
                lanes v = load_some(x + c, some) + load_some(gate + c, some) * load_some(out + c, some);
                store_some(x1 + c, v, some);
                sum += v;
            }
            x = x1;
        } else {
            for (long c = 0; c < size; c += LANES) sum += load_some(x + c, size - c);
        }
        float mean = total(sum) / size;
        lanes square = {0};
        long c = 0;
        for (; c + LANES <= size; c += LANES) {
            lanes v = load(x + c) - mean;
            square += v * v;
        }
        float rest = 0;
        for (; c < size; c++) rest += (x[c] - mean) * (x[c] - mean);
        float rstd = 1.0f / sqrtf((total(square) + rest) / size + n->eps);
        n->mean[image * n->tokens + token] = mean;
        n->rstd[image * n->tokens + token] = rstd;
        for (c = 0; c < size; c += LANES) {
            long some = size - c;
            lanes v = (load_some(x + c, some) - mean) * rstd;
            store_some(n->h + at + c, v * (1.0f + load_some(scale + c, some)) + load_some(shift + c, some),
                       some);
        }
    }
}

/* parts of a run: gradients of gate, of shift, of scale. */
static void norm_backward(const void *arg, long task) {
    const norm_t *n = arg;
    long image = task / runs(n), first = task % runs(n) * ROWS, size = n->channels;
    long last = first + ROWS < n->tokens ? first + ROWS : n->tokens;
    const float *gate = n->gate + image * n->stride, *scale = n->scale + image * n->stride;
    float *of_gate = n->parts + task * 3 * size, *of_shift = of_gate + size, *of_scale = of_shift + size;
    memset(of_gate, 0, sizeof(float) * 3 * size);
    for (long token = first; token < last; token++) {
        long row = image * n->tokens + token, at = row * size;
        float mean = n->mean_in[row], rstd = n->rstd_in[row];
        const float *x = n->x + at, *g = n->grad_h + at;
        lanes one = {0}, two = {0};
        for (long c = 0; c < size; c += LANES) {
            long some = size - c;
            lanes grad = load_some(g + c, some);
            lanes hat = (load_some(x + c, some) - mean) * rstd;
            store_some(of_shift + c, load_some(of_shift + c, some) + grad, some);
            store_some(of_scale + c, load_some(of_scale + c, some) + grad * hat, some);
            grad *= 1.0f + load_some(scale + c, some);
            one += grad;
            two += grad * hat; /* zero past the end: grad is */
        }
        float a = total(one) / size, b = total(two) / size;
        long out = (image * n->tokens + place(n, token)) * size;
        for (long c = 0; c < size; c += LANES) {
            long some = size - c;
            lanes hat = (load_some(x + c, some) - mean) * rstd;
            lanes grad = load_some(g + c, some) * (1.0f + load_some(scale + c, some));
            grad = rstd * (grad - a - hat * b);
            if (n->grad_x1) grad += load_some(n->grad_x1 + at + c, some);
            store_some(n->grad_x + at + c, grad, some);
            if (!n->out) continue;
            lanes was = load_some(n->out + out + c, some);
            store_some(of_gate + c, load_some(of_gate + c, some) + grad * was, some);
            store_some(n->grad_out + out + c, grad * load_some(gate + c, some), some);
        }
    }
}

static void gate_forward(const void *arg, long task) {
    const norm_t *n = arg;
    long image = task / runs(n), first = task % runs(n) * ROWS, size = n->channels;
    long last = first + ROWS < n->tokens ? first + ROWS : n->tokens;
    const float *gate = n->gate + image * n->stride;
    for (long token = first; token < last; token++) {
        long at = (image * n->tokens + token) * size;
        const float *out = n->out + (image * n->tokens + place(n, token)) * size;
        for (long c = 0; c < size; c += LANES) {
            long some = size - c;
            store_some(n->x1 + at + c,
                       load_some(n->x + at + c, some) + load_some(gate + c, some) * load_some(out + c, some),
                       some);
        }
    }
}

static void gate_backward(const void *arg, long task) {
    const norm_t *n = arg;
    long image = task / runs(n), first = task % runs(n) * ROWS, size = n->channels;
    long last = first + ROWS < n->tokens ? first + ROWS : n->tokens;
    const float *gate = n->gate + image * n->stride;
    float *of_gate = n->parts + task * size;
    memset(of_gate, 0, sizeof(float) * size);
    for (long token = first; token < last; token++) {
        long at = (image * n->tokens + token) * size;
        long out = (image * n->tokens + place(n, token)) * size;
        for (long c = 0; c < size; c += LANES) {
            long some = size - c;
            lanes grad = load_some(n->grad_x1 + at + c, some);
            store_some(of_gate + c,
                       load_some(of_gate + c, some) + grad * load_some(n->out + out + c, some), some);
            store_some(n->grad_out + out + c, grad * load_some(gate + c, some), some);
        }
    }
}

/* Sums over the runs of an image in their order: parts (B, runs, count) -> to (B, count). */
static void add_runs(const float *parts, float *to, long images, long many, long count) {
    for (long b = 0; b < images; b++) {
        float *sum = to + b * count;
        memcpy(sum, parts + b * many * count, sizeof(float) * count);
        for (long r = 1; r < many; r++)
            for (long i = 0; i < count; i++) sum[i] += parts[(b * many + r) * count + i];
    }
}

void gated_norm(const float *x, const float *out, const float *gate, const float *shift,
                const float *scale, float *x1, float *h, float *mean, float *rstd, long images,
                long tokens, long channels, long stride, long grid, float eps, int threads) {
    norm_t n = {.x = x, .out = out, .gate = gate, .shift = shift, .scale = scale, .x1 = x1, .h = h,
                .mean = mean, .rstd = rstd, .images = images, .tokens = tokens,
                .channels = channels, .stride = stride, .grid = grid, .eps = eps};
    run_tasks(norm_forward, &n, images * runs(&n), threads);
}

/* grads (B, 3, C): of gate, shift, scale; parts (B, runs, 3, C) is room to work in. */
void gated_norm_backward(const float *grad_x1, const float *grad_h, const float *x1,
                         const float *out, const float *gate, const float *scale,
                         const float *mean, const float *rstd, float *grad_x, float *grad_out,
                         float *grads, float *parts, long images, long tokens, long channels,
                         long stride, long grid, int threads) {
    norm_t n = {.x = x1, .out = out, .gate = gate, .scale = scale, .grad_x1 = grad_x1,
                .grad_h = grad_h, .mean_in = mean, .rstd_in = rstd, .grad_x = grad_x,
                .grad_out = grad_out, .parts = parts, .images = images, .tokens = tokens,
                .channels = channels, .stride = stride, .grid = grid};
    run_tasks(norm_backward, &n, images * runs(&n), threads);
    add_runs(parts, grads, images, runs(&n), 3 * channels);
}

void gated(const float *x, const float *out, const float *gate, float *x1, long images, long tokens,
           long channels, long stride, long grid, int threads) {
    norm_t n = {.x = x, .out = out, .gate = gate, .x1 = x1, .images = images, .tokens = tokens,
                .channels = channels, .stride = stride, .grid = grid};
    run_tasks(gate_forward, &n, images * runs(&n), threads);
}

void gated_backward(const float *grad, const float *out, const float *gate, float *grad_out,
                    float *grad_gate, float *parts, long images, long tokens, long channels,
                    long stride, long grid, int threads) {
    norm_t n = {.grad_x1 = grad, .out = out, .gate = gate, .grad_out = grad_out, .parts = parts,
                .images = images, .tokens = tokens, .channels = channels, .stride = stride,
                .grid = grid};
    run_tasks(gate_backward, &n, images * runs(&n), threads);
    add_runs(parts, grad_gate, images, runs(&n), channels);
}
