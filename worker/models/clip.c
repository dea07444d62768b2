// CLIP's text encoder. Details that caused bugs elsewhere:
//  - Attention is causal. The pooled output is at the first end-of-text token, not at the last position.
//  - Old configurations say eos_token_id 2 and mean "the largest id", which is where end of text is.
#include "worker/models/clip.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/config.h"
#include "worker/weights.h"

struct layer {
    struct tensor norm1_gamma, norm1_beta, norm2_gamma, norm2_beta;
    struct linear qkv, out, up, down;
};

struct clip {
    struct weights *weights;
    int64_t layers, heads, dim, inner, positions, vocabulary, eos;
    double eps;
    enum act act;
    struct tensor tokens, places, final_gamma, final_beta;
    struct layer *layer;
};

static int load_config(struct clip *c, const char *dir, struct err *err)
{
    struct config *f = config_open(dir, "config.json", err);
    char act[32];
    config_require(f, "model_type", "clip_text_model");
    config_int(f, "num_hidden_layers", 1, 256, &c->layers);
    config_int(f, "num_attention_heads", 1, 256, &c->heads);
    config_int(f, "hidden_size", 1, 65536, &c->dim);
    config_int(f, "intermediate_size", 1, 1 << 20, &c->inner);
    config_int(f, "max_position_embeddings", 2, 4096, &c->positions);
    config_int(f, "vocab_size", 3, 1 << 24, &c->vocabulary);
    config_int(f, "eos_token_id", 0, c->vocabulary, &c->eos);
    c->eps = 1e-5;
    config_float_or(f, "layer_norm_eps", 0, 1, &c->eps);
    config_string(f, "hidden_act", act, sizeof act);
    c->act = strcmp(act, "gelu") == 0 ? ACT_GELU_ERF : ACT_QUICK_GELU;
    if (strcmp(act, "gelu") != 0 && strcmp(act, "quick_gelu") != 0)
        config_fail(f, ERR_UNSUPPORTED, "hidden_act is \"%s\"; supported: quick_gelu, gelu", act);
    if (c->heads > 0 && c->dim % c->heads)
        config_fail(f, ERR_INVALID, "hidden_size must be a multiple of num_attention_heads");
    return config_close(f, err);
}

static int load_layer(const struct clip *c, struct layer *l, int64_t i, struct err *err)
{
    static const char *const qkv[] = {"q_proj", "k_proj", "v_proj"};
    struct weights *w = c->weights;
    const int64_t dim = c->dim, n[] = {dim, dim, dim};
    char at[64], attn[96];
    snprintf(at, sizeof at, "text_model.encoder.layers.%d", (int)i);
    snprintf(attn, sizeof attn, "%s.self_attn", at);
    TRY(weights_norm(w, &l->norm1_gamma, &l->norm1_beta, dim, err, "%s.layer_norm1", at));
    TRY(weights_norm(w, &l->norm2_gamma, &l->norm2_beta, dim, err, "%s.layer_norm2", at));
    TRY(weights_linear(w, &l->qkv, attn, 3, qkv, n, dim, true, err));
    TRY(weights_linear1(w, &l->out, dim, dim, true, err, "%s.out_proj", attn));
    TRY(weights_linear1(w, &l->up, c->inner, dim, true, err, "%s.mlp.fc1", at));
    return weights_linear1(w, &l->down, dim, c->inner, true, err, "%s.mlp.fc2", at);
}

static int load_weights(struct clip *c, const char *dir, const struct home *home, struct err *err)
{
    TRY(weights_open(dir, "model", home, &c->weights, err));
    c->layer = calloc((size_t)c->layers, sizeof *c->layer);
    if (!c->layer)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    TRY(weights_get(c->weights, &c->tokens, 2, c->vocabulary, c->dim, 1, 1, err,
                    "text_model.embeddings.token_embedding.weight"));
    TRY(weights_get(c->weights, &c->places, 2, c->positions, c->dim, 1, 1, err,
                    "text_model.embeddings.position_embedding.weight"));
    for (int64_t i = 0; i < c->layers; i++)
        TRY(load_layer(c, &c->layer[i], i, err));
    TRY(weights_refuse(c->weights, "num_hidden_layers", err, "text_model.encoder.layers.%d.layer_norm1.weight",
                       (int)c->layers));
    return weights_norm(c->weights, &c->final_gamma, &c->final_beta, c->dim, err, "text_model.final_layer_norm");
}

int clip_load(const char *dir, const struct home *home, struct clip **out, struct err *err)
{
    *out = NULL;
    struct clip *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    int rc = load_config(c, dir, err);
    if (rc == 0)
        rc = load_weights(c, dir, home, err);
    if (rc != 0) {
        clip_free(c);
        return rc;
    }
    *out = c;
    return 0;
}

void clip_free(struct clip *c)
{
    if (!c)
        return;
    weights_free(c->weights);
    free(c->layer);
    free(c);
}

int64_t clip_hidden(const struct clip *c)
{
    return c->dim;
}

int64_t clip_positions(const struct clip *c)
{
    return c->positions;
}

int64_t clip_vocabulary(const struct clip *c)
{
    return c->vocabulary;
}

const struct weights *clip_weights(const struct clip *c)
{
    return c->weights;
}

static struct tensor heads_of(const struct clip *c, struct tensor t)
{
    return tensor_reshape(t, 3, t.n[0], c->heads, c->dim / c->heads, 1);
}

static void encode_layer(const struct clip *c, struct exec *x, const struct layer *l, struct tensor h)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor normed = exec_tensor(x, 2, c->positions, c->dim, 1, 1);
    struct tensor y = exec_tensor(x, 2, c->positions, c->dim, 1, 1);
    struct tensor qkv = exec_tensor(x, 2, c->positions, 3 * c->dim, 1, 1);
    struct tensor inner = exec_tensor(x, 2, c->positions, c->inner, 1, 1);

    x->k->layer_norm(x->d, normed, h, l->norm1_gamma, l->norm1_beta, (float)c->eps);
    x->k->linear(x->d, qkv, normed, &l->qkv, ACT_NONE);
    const struct attention_opts opts = {.scale = 1.0F / sqrtf((float)c->dim / (float)c->heads), .causal = true};
    x->k->attention(x->d, heads_of(c, y), heads_of(c, tensor_cols(qkv, 0, c->dim)),
                    heads_of(c, tensor_cols(qkv, c->dim, c->dim)), heads_of(c, tensor_cols(qkv, 2 * c->dim, c->dim)),
                    &opts);
    x->k->linear(x->d, normed, y, &l->out, ACT_NONE);
    x->k->add(x->d, h, normed);
    x->k->layer_norm(x->d, normed, h, l->norm2_gamma, l->norm2_beta, (float)c->eps);
    x->k->linear(x->d, inner, normed, &l->up, c->act);
    x->k->linear(x->d, y, inner, &l->down, ACT_NONE);
    x->k->add(x->d, h, y);
    arena_release(x->arena, mark);
}

static int64_t end_of_text(const struct clip *c, const int32_t *ids)
{
    int64_t largest = 0;
    for (int64_t i = 0; i < c->positions; i++) {
        if (ids[i] > ids[largest])
            largest = i;
        if (c->eos != 2 && ids[i] == c->eos)
            return i;
    }
    return c->eos == 2 ? largest : 0; // as the reference's argmax of an all-zero comparison
}

void clip_encode(const struct clip *c, struct exec *x, const int32_t *ids, struct tensor pooled)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor id = arena_tensor(x->arena, DT_I32, 1, c->positions, 1, 1, 1);
    struct tensor h = exec_tensor(x, 2, c->positions, c->dim, 1, 1);
    struct tensor place = exec_tensor(x, 2, c->positions, c->dim, 1, 1);
    int32_t *order = malloc((size_t)c->positions * sizeof *order);
    for (int32_t i = 0; order && i < c->positions; i++)
        order[i] = i;
    x->k->upload(x->d, id, order);
    x->k->embed(x->d, place, c->places, id);
    x->k->upload(x->d, id, ids);
    x->k->embed(x->d, h, c->tokens, id);
    free(order);
    x->k->add(x->d, h, place);
    for (int64_t i = 0; i < c->layers; i++)
        encode_layer(c, x, &c->layer[i], h);
    x->k->layer_norm(x->d, pooled, tensor_rows(h, end_of_text(c, ids), 1), c->final_gamma, c->final_beta,
                     (float)c->eps);
    arena_release(x->arena, mark);
}
