/* y = silu(gate)*up of rows of numbers, and its gradients. A task is a run of COUNT numbers. */
#include "lanes.h"

enum { COUNT = 1 << 14 };

typedef struct {
    const float *gate, *up, *grad;
    float *y, *grad_gate, *grad_up;
    long size;
} swiglu_t;

/* 1 / (1 + e^-x) by e^-|x|, which is at most one; and what it lacks to one, without cancelling. */
INLINE lanes sigmoid(lanes x, lanes *rest) {
    bits below = (bits)(x < all(0.0f));
    lanes small = exp_negative(choose(below, x, -x)), large = inverse(1.0f + small);
    small = small * large;
    *rest = choose(below, large, small);
    return choose(below, small, large);
}

static void forward(const void *arg, long task) {
    const swiglu_t *s = arg;
    long last = (task + 1) * COUNT < s->size ? (task + 1) * COUNT : s->size;
    for (long i = task * COUNT; i < last; i += LANES) {
        long some = last - i;
        lanes gate = load_some(s->gate + i, some), rest;
        store_some(s->y + i, gate * sigmoid(gate, &rest) * load_some(s->up + i, some), some);
    }
}

static void backward(const void *arg, long task) {
    const swiglu_t *s = arg;
    long last = (task + 1) * COUNT < s->size ? (task + 1) * COUNT : s->size;
    for (long i = task * COUNT; i < last; i += LANES) {
        long some = last - i;
        lanes gate = load_some(s->gate + i, some), grad = load_some(s->grad + i, some);
        lanes rest, part = sigmoid(gate, &rest);
        store_some(s->grad_up + i, grad * gate * part, some);
        /* the slope of silu: part + gate * part * (1 - part) */
        grad = grad * load_some(s->up + i, some);
        store_some(s->grad_gate + i, grad * part * (1.0f + gate * rest), some);
    }
}

static long tasks(long size) { return (size + COUNT - 1) / COUNT; }

void swiglu(const float *gate, const float *up, float *y, long size, int threads) {
    swiglu_t s = {.gate = gate, .up = up, .y = y, .size = size};
    run_tasks(forward, &s, tasks(size), threads);
}

void swiglu_backward(const float *grad, const float *gate, const float *up, float *grad_gate,
                     float *grad_up, long size, int threads) {
    swiglu_t s = {.gate = gate, .up = up, .grad = grad, .grad_gate = grad_gate,
                  .grad_up = grad_up, .size = size};
    run_tasks(backward, &s, tasks(size), threads);
}
