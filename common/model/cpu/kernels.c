// Inner loops of kernels.py.
#include "native.h"

// y = (x - mean) * scale * weight + bias: x, y (rows, width), weight, bias (width) of one kind.
// LayerNorm: of each row the mean and scale = 1 / sqrt(variance + eps), kept in mean, scale (rows).
// RMSNorm: bias and mean NULL, scale = 1 / sqrt(mean(x^2) + eps).
void norm(const void *x, int x_half, const void *weight, int w_half, const void *bias, void *y,
          int y_half, float *mean, float *scale, long rows, long width, float eps) {
#pragma omp parallel WORTH_THREADS(rows * width)
    {
        float w[width], b[width], v[width];
        load(w, weight, w_half, width);
        for (long i = 0; i < width; i++) b[i] = bias ? element(bias, w_half, i) : 0;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            float sum = 0, squares = 0;
            load(v, AT(x, x_half, r * width), x_half, width);
            if (mean) {
                for (long i = 0; i < width; i++) sum += v[i];
                mean[r] = sum / width;
                for (long i = 0; i < width; i++) v[i] -= mean[r];
            }
            for (long i = 0; i < width; i++) squares += v[i] * v[i];
            scale[r] = 1 / __builtin_sqrtf(squares / width + eps);
            for (long i = 0; i < width; i++) v[i] = v[i] * scale[r] * w[i] + b[i];
            store(AT(y, y_half, r * width), v, y_half, width);
        }
    }
}

// g: gradient of y. dweight, dbias (threads, width), zero at first: what each thread adds up; dbias
// NULL: no bias.
void norm_backward(const void *g, int g_half, const void *x, int x_half, const void *weight,
                   int w_half, const float *mean, const float *scale, void *dx, int dx_half,
                   float *dweight, float *dbias, int threads, long rows, long width) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        float w[width], v[width], d[width], *dw = dweight + thread * width;
        load(w, weight, w_half, width);
        for (long r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
            load(v, AT(x, x_half, r * width), x_half, width);
            load(d, AT(g, g_half, r * width), g_half, width);
            float s = scale[r], m = mean ? mean[r] : 0, along = 0, sum = 0;
            if (dbias)
                for (long i = 0; i < width; i++) dbias[thread * width + i] += d[i];
            for (long i = 0; i < width; i++) {
                v[i] = (v[i] - m) * s;
                dw[i] += d[i] * v[i];
                d[i] *= w[i];
                along += d[i] * v[i];
                sum += d[i];
            }
            along /= width;
            sum = mean ? sum / width : 0;
            for (long i = 0; i < width; i++) d[i] = s * (d[i] - sum - v[i] * along);
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

// GPT-2's GELU, x * sigmoid(2 u) = x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + .044715 x^3), of
// x (rows, width).
void gelu(const void *x, int half, void *y, long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float v[width];
        load(v, AT(x, half, r * width), half, width);
        for (long i = 0; i < width; i++)
            v[i] /= 1 + exponential(-1.59576912f * v[i] * (1 + 0.044715f * v[i] * v[i]));
        store(AT(y, half, r * width), v, half, width);
    }
}

void gelu_backward(const void *g, const void *x, int half, void *dx, long rows, long width) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *width)
    for (long r = 0; r < rows; r++) {
        float v[width], d[width];
        load(v, AT(x, half, r * width), half, width);
        load(d, AT(g, half, r * width), half, width);
        for (long i = 0; i < width; i++) {
            float square = v[i] * v[i],
                  s = 1 / (1 + exponential(-1.59576912f * v[i] * (1 + 0.044715f * square)));
            d[i] *= s + v[i] * s * (1 - s) * 1.59576912f * (1 + 0.134145f * square);
        }
        store(AT(dx, half, r * width), d, half, width);
    }
}

// log softmax(logits * sharpness) (rows, width) at targets -> logprobs (rows); entropies (rows), or
// NULL.
void logprobs_at(const void *logits, int half, const int64_t *targets, float sharpness,
                 float *logprobs, float *entropies, long rows, long width) {
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

// Its gradient, in place of the logits: -g * p, but at_target[r] at the targets. g (rows): the
// gradient, times sharpness.
void logprobs_at_backward(void *logits, int half, const int64_t *targets, float sharpness,
                          const float *logprobs, const float *g, const float *at_target, long rows,
                          long width) {
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

// ids (rows) drawn from softmax(logits * sharpness): the first whose cumulative probability exceeds
// uniforms (rows) in [0, 1). logprobs (rows): theirs. A logit may be -inf: its id is never drawn;
// with NaN or +inf in the row its log-prob is NaN.
void pick_ids(const void *logits, int half, const float *uniforms, float sharpness, int64_t *ids,
              float *logprobs, long rows, long width) {
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
            for (long i = b * BLOCK; i < end; i++)
                sum += x[i] = exponential((x[i] - most) * sharpness);
            total += sums[b] = sum;
        }
        float left = uniforms[r] * total;
        long b = 0, last = 0;
        while ((b + 1) * BLOCK < width && left >= sums[b]) left -= sums[b++];
        for (long i = b * BLOCK; i < width; i++)  // rounding may miss the end of a block
            if (x[i] > 0) {
                last = i;
                if (left < x[i]) break;
                left -= x[i];
            }
        if (!(x[last] > 0))  // or pass what has any probability
            for (last = width - 1; last > 0 && !(x[last] > 0);) last--;
        ids[r] = last;
        logprobs[r] = __builtin_logf(x[last] / total);
    }
}
