// T5's encoder. Details that caused bugs elsewhere:
//  - Scores are not scaled; the position bias of the first block serves all blocks; norms have no mean and no beta.
//  - Buckets are bidirectional: half for keys ahead, exact up to a quarter, logarithmic beyond.
#include "worker/models/t5.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "worker/config.h"
#include "worker/weights.h"

struct layer {
    struct tensor norm1, norm2;
    struct linear qkv, out, gate_up, down; // gate: wi_0, through GELU; up: wi_1
};

struct t5 {
    struct weights *weights;
    int64_t layers, heads, head_dim, dim, inner, vocabulary, buckets, max_distance;
    double eps;
    struct tensor tokens, bias, final_norm;
    struct layer *layer;
};

static int load_config(struct t5 *t, const char *dir, struct err *err)
{
    struct config *f = config_open(dir, "config.json", err);
    config_require(f, "model_type", "t5");
    config_require(f, "feed_forward_proj", "gated-gelu");
    config_int(f, "num_layers", 1, 256, &t->layers);
    config_int(f, "num_heads", 1, 256, &t->heads);
    config_int(f, "d_kv", 1, 1024, &t->head_dim);
    config_int(f, "d_model", 1, 65536, &t->dim);
    config_int(f, "d_ff", 1, 1 << 20, &t->inner);
    config_int(f, "vocab_size", 3, 1 << 24, &t->vocabulary);
    t->buckets = 32, t->max_distance = 128, t->eps = 1e-6;
    config_int_or(f, "relative_attention_num_buckets", 4, 4096, &t->buckets);
    config_int_or(f, "relative_attention_max_distance", 8, 1 << 20, &t->max_distance);
    config_float_or(f, "layer_norm_epsilon", 0, 1, &t->eps);
    if (t->max_distance <= t->buckets / 4)
        config_fail(f, ERR_INVALID, "relative_attention_max_distance must exceed a quarter of the buckets");
    return config_close(f, err);
}

static int load_layer(const struct t5 *t, struct layer *l, int64_t i, struct err *err)
{
    static const char *const qkv[] = {"q", "k", "v"}, *const gate_up[] = {"wi_0", "wi_1"};
    struct weights *w = t->weights;
    const int64_t width = t->heads * t->head_dim, n[] = {width, width, width}, inner[] = {t->inner, t->inner};
    char at[64], attn[96], dense[96];
    snprintf(at, sizeof at, "encoder.block.%d.layer", (int)i);
    snprintf(attn, sizeof attn, "%s.0.SelfAttention", at);
    TRY(weights_get(w, &l->norm1, 1, t->dim, 1, 1, 1, err, "%s.0.layer_norm.weight", at));
    TRY(weights_get(w, &l->norm2, 1, t->dim, 1, 1, 1, err, "%s.1.layer_norm.weight", at));
    TRY(weights_linear(w, &l->qkv, attn, 3, qkv, n, t->dim, false, err));
    TRY(weights_linear1(w, &l->out, t->dim, width, false, err, "%s.o", attn));
    snprintf(dense, sizeof dense, "%s.1.DenseReluDense", at);
    TRY(weights_linear(w, &l->gate_up, dense, 2, gate_up, inner, t->dim, false, err));
    return weights_linear1(w, &l->down, t->dim, t->inner, false, err, "%s.wo", dense);
}

static int load_weights(struct t5 *t, const char *dir, const struct home *home, struct err *err)
{
    TRY(weights_open(dir, "model", home, &t->weights, err));
    t->layer = calloc((size_t)t->layers, sizeof *t->layer);
    if (!t->layer)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    const bool shared = weights_has(t->weights, "shared.weight");
    TRY(weights_get(t->weights, &t->tokens, 2, t->vocabulary, t->dim, 1, 1, err,
                    shared ? "shared.weight" : "encoder.embed_tokens.weight"));
    TRY(weights_get(t->weights, &t->bias, 2, t->buckets, t->heads, 1, 1, err,
                    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"));
    for (int64_t i = 0; i < t->layers; i++)
        TRY(load_layer(t, &t->layer[i], i, err));
    TRY(weights_refuse(t->weights, "num_layers", err, "encoder.block.%d.layer.0.layer_norm.weight", (int)t->layers));
    return weights_get(t->weights, &t->final_norm, 1, t->dim, 1, 1, 1, err, "encoder.final_layer_norm.weight");
}

int t5_load(const char *dir, const struct home *home, struct t5 **out, struct err *err)
{
    *out = NULL;
    struct t5 *t = calloc(1, sizeof *t);
    if (!t)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    int rc = load_config(t, dir, err);
    if (rc == 0)
        rc = load_weights(t, dir, home, err);
    if (rc != 0) {
        t5_free(t);
        return rc;
    }
    *out = t;
    return 0;
}

void t5_free(struct t5 *t)
{
    if (!t)
        return;
    weights_free(t->weights);
    free(t->layer);
    free(t);
}

int64_t t5_hidden(const struct t5 *t)
{
    return t->dim;
}

int64_t t5_vocabulary(const struct t5 *t)
{
    return t->vocabulary;
}

const struct weights *t5_weights(const struct t5 *t)
{
    return t->weights;
}

// Bucket of a key at distance (key position - query position), as T5Attention._relative_position_bucket.
static int32_t bucket_of(const struct t5 *t, int64_t distance)
{
    const int64_t half = t->buckets / 2, exact = half / 2, n = distance < 0 ? -distance : distance;
    const int64_t side = distance > 0 ? half : 0;
    if (n < exact)
        return (int32_t)(side + n);
    float far =
        logf((float)n / (float)exact) / (float)log((double)t->max_distance / (double)exact) * (float)(half - exact);
    int64_t b = exact + (int64_t)far;
    return (int32_t)(side + (b < half - 1 ? b : half - 1));
}

// The bias (heads, tokens, tokens) that all blocks share, allocated in the arena.
static struct tensor position_bias(const struct t5 *t, struct exec *x, int64_t tokens)
{
    struct tensor bias = arena_tensor(x->arena, DT_F32, 3, t->heads, tokens, tokens, 1);
    struct tensor buckets = arena_tensor(x->arena, DT_I32, 1, 2 * tokens - 1, 1, 1, 1);
    int32_t *host = malloc((size_t)(2 * tokens - 1) * sizeof *host);
    for (int64_t i = 0; host && i < 2 * tokens - 1; i++)
        host[i] = bucket_of(t, i - (tokens - 1));
    x->k->upload(x->d, buckets, host);
    free(host);
    x->k->relative_bias(x->d, bias, t->bias, buckets);
    return bias;
}

static void encode_layer(const struct t5 *t, struct exec *x, const struct layer *l, struct tensor h, struct tensor bias)
{
    const size_t mark = arena_mark(x->arena);
    const int64_t tokens = h.n[0], width = t->heads * t->head_dim;
    struct tensor normed = exec_tensor(x, 2, tokens, t->dim, 1, 1);
    const size_t inner = arena_mark(x->arena);

    struct tensor attended = exec_tensor(x, 2, tokens, width, 1, 1);
    struct tensor qkv = exec_tensor(x, 2, tokens, 3 * width, 1, 1), head[3];
    x->k->rms_norm(x->d, normed, h, l->norm1, (float)t->eps);
    x->k->linear(x->d, qkv, normed, &l->qkv, ACT_NONE);
    for (int i = 0; i < 3; i++)
        head[i] = tensor_reshape(tensor_cols(qkv, i * width, width), 3, tokens, t->heads, t->head_dim, 1);
    const struct attention_opts opts = {.scale = 1.0F, .bias = bias};
    x->k->attention(x->d, tensor_reshape(attended, 3, tokens, t->heads, t->head_dim, 1), head[0], head[1], head[2],
                    &opts);
    x->k->linear(x->d, normed, attended, &l->out, ACT_NONE);
    x->k->add(x->d, h, normed);
    arena_release(x->arena, inner);

    struct tensor both = exec_tensor(x, 2, tokens, 2 * t->inner, 1, 1);
    struct tensor gate = tensor_cols(both, 0, t->inner), up = tensor_cols(both, t->inner, t->inner);
    x->k->rms_norm(x->d, normed, h, l->norm2, (float)t->eps);
    x->k->linear(x->d, both, normed, &l->gate_up, ACT_NONE);
    x->k->mul(x->d, gate, up, ACT_GELU_TANH);
    x->k->linear(x->d, normed, gate, &l->down, ACT_NONE);
    x->k->add(x->d, h, normed);
    arena_release(x->arena, mark);
}

void t5_encode(const struct t5 *t, struct exec *x, const int32_t *ids, struct tensor out)
{
    const size_t mark = arena_mark(x->arena);
    const int64_t tokens = out.n[0];
    struct tensor id = arena_tensor(x->arena, DT_I32, 1, tokens, 1, 1, 1);
    struct tensor h = exec_tensor(x, 2, tokens, t->dim, 1, 1);
    struct tensor bias = position_bias(t, x, tokens);
    x->k->upload(x->d, id, ids);
    x->k->embed(x->d, h, t->tokens, id);
    for (int64_t i = 0; i < t->layers; i++)
        encode_layer(t, x, &t->layer[i], h, bias);
    x->k->rms_norm(x->d, out, h, t->final_norm, (float)t->eps);
    arena_release(x->arena, mark);
}
