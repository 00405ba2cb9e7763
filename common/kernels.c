// Inner loops of kernels.py.
#include "native.h"

INLINE float dot(const float *a, const float *b, long n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// y = x * scale * weight, scale = 1 / sqrt(mean(x^2) + eps): x, y (rows, width), weight (width), scale (rows).
void rms_norm(const void *x, int x_half, const void *weight, int w_half, void *y, int y_half, float *scale, long rows,
              long width, float eps) {
#pragma omp parallel WORTH_THREADS(rows * width)
    {
        float w[width], v[width];
        load(w, weight, w_half, width);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            load(v, AT(x, x_half, r * width), x_half, width);
            float s = 1 / __builtin_sqrtf(dot(v, v, width) / width + eps);
            for (long i = 0; i < width; i++) v[i] *= s * w[i];
            store(AT(y, y_half, r * width), v, y_half, width);
            if (scale) scale[r] = s;
        }
    }
}

// g: gradient of y. dweight (threads, width), zero at first: what each thread adds up.
void rms_norm_backward(const void *g, int g_half, const void *x, int x_half, const void *weight, int w_half,
                       const float *scale, void *dx, int dx_half, float *dweight, int threads, long rows, long width) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        float w[width], v[width], d[width], *dw = dweight + thread * width;
        load(w, weight, w_half, width);
        for (long r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
            load(v, AT(x, x_half, r * width), x_half, width);
            load(d, AT(g, g_half, r * width), g_half, width);
            float s = scale[r], sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < width; i++) {
                v[i] *= s;
                dw[i] += d[i] * v[i];
                d[i] *= w[i];
                sum += d[i] * v[i];
            }
            sum /= width;
            for (long i = 0; i < width; i++) d[i] = s * (d[i] - v[i] * sum);
            store(AT(dx, dx_half, r * width), d, dx_half, width);
        }
    }
}

// y = silu(gate) * value: h (rows, 2 width), gate first; y (rows, width).
void swiglu(const void *h, int half, void *y, long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float v[2 * width], *gate = v, *value = v + width;
        load(v, AT(h, half, 2 * r * width), half, 2 * width);
        for (long i = 0; i < width; i++) value[i] *= gate[i] / (1 + exponential(-gate[i]));
        store(AT(y, half, r * width), value, half, width);
    }
}

void swiglu_backward(const void *g, const void *h, int half, void *dh, long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float v[2 * width], d[width], *gate = v, *value = v + width;
        load(v, AT(h, half, 2 * r * width), half, 2 * width);
        load(d, AT(g, half, r * width), half, width);
        for (long i = 0; i < width; i++) {
            float sigmoid = 1 / (1 + exponential(-gate[i])), silu = gate[i] * sigmoid;
            gate[i] = d[i] * value[i] * (sigmoid + silu * (1 - sigmoid));
            value[i] = d[i] * silu;
        }
        store(AT(dh, half, 2 * r * width), v, half, 2 * width);
    }
}

// log softmax(logits * sharpness) (rows, width) at targets -> logprobs (rows); entropies (rows), or NULL.
void logprobs_at(const void *logits, int half, const int64_t *targets, float sharpness, float *logprobs, float *entropies,
                 long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float x[width], most = -__builtin_inff(), sum = 0, mean = 0;
        load(x, AT(logits, half, r * width), half, width);
#pragma omp simd reduction(max : most)
        for (long i = 0; i < width; i++) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : sum, mean)
        for (long i = 0; i < width; i++) {
            float above = (x[i] - most) * sharpness, e = exponential(above);
            sum += e;
            mean += e * above;
        }
        float normaliser = __builtin_logf(sum);
        logprobs[r] = (x[targets[r]] - most) * sharpness - normaliser;
        if (entropies) entropies[r] = normaliser - mean / sum;
    }
}

// Its gradient, in place of the logits: -g * p, but at_target[r] at the targets. g (rows): the gradient, times sharpness.
void logprobs_at_backward(void *logits, int half, const int64_t *targets, float sharpness, const float *logprobs,
                          const float *g, const float *at_target, long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float x[width];
        load(x, AT(logits, half, r * width), half, width);
        float normaliser = x[targets[r]] * sharpness - logprobs[r];
        for (long i = 0; i < width; i++) x[i] = -g[r] * exponential(x[i] * sharpness - normaliser);
        x[targets[r]] = at_target[r];
        store(AT(logits, half, r * width), x, half, width);
    }
}

// ids (rows) drawn from softmax(logits * sharpness): the first whose cumulative probability exceeds uniforms (rows) in [0, 1).
// logprobs (rows): theirs. A logit may be -inf: its id is never drawn.
void pick_ids(const void *logits, int half, const float *uniforms, float sharpness, int64_t *ids, float *logprobs, long rows,
              long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        enum { BLOCK = 64 };
        float x[width], sums[width / BLOCK + 1], most = -__builtin_inff(), total = 0;
        load(x, AT(logits, half, r * width), half, width);
#pragma omp simd reduction(max : most)
        for (long i = 0; i < width; i++) most = x[i] > most ? x[i] : most;
        for (long b = 0; b * BLOCK < width; b++) {
            long end = (b + 1) * BLOCK < width ? (b + 1) * BLOCK : width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = b * BLOCK; i < end; i++) sum += x[i] = exponential((x[i] - most) * sharpness);
            total += sums[b] = sum;
        }
        float left = uniforms[r] * total;
        long b = 0, last = 0;
        while ((b + 1) * BLOCK < width && left >= sums[b]) left -= sums[b++];
        for (long i = b * BLOCK; i < width; i++)  // rounding may miss the end of a block, or of the row
            if (x[i] > 0) {
                last = i;
                if (left < x[i]) break;
                left -= x[i];
            }
        ids[r] = last;
        logprobs[r] = __builtin_logf(x[last] / total);
    }
}
