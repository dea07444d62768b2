// AutoencoderKL's decoder. Details that caused bugs elsewhere:
//  - Blocks go up in reverse order of block_out_channels, each with layers_per_block + 1 resnets.
//  - The mid-block's attention has one head as wide as its channels, unlike the number in some configurations.
//  - Group norms look at the whole picture: their sums cross ranks. 3x3 convolutions need one row of each neighbour.
#include "worker/models/vae.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "worker/config.h"
#include "worker/weights.h"

enum { MAX_LEVELS = 8, MAX_RESNETS = 9 };
static const float EPS = 1e-6F;

struct norm {
    struct tensor gamma, beta;
};

struct resnet {
    int64_t in, out;
    struct norm norm1, norm2;
    struct conv conv1, conv2, shortcut; // shortcut only when in != out
};

struct attention {
    struct norm norm;
    struct linear qkv, out;
};

struct level {
    struct resnet resnet[MAX_RESNETS];
    bool upsamples;
    struct conv upsample;
};

struct vae {
    struct weights *weights;
    int64_t latent_channels, channels[MAX_LEVELS], layers, groups, out_channels;
    int levels;
    double scaling_factor, shift_factor;
    bool post_quant, mid_attention;
    struct conv post_quant_conv, conv_in, conv_out;
    struct resnet mid[2];
    struct attention attention;
    struct level level[MAX_LEVELS]; // in decoding order
    struct norm norm_out;
};

// ---- forward

// The picture on its way up. It lies on one of the arena's stacks; what is made from it is put on the other.
struct picture {
    struct tensor t; // (h, w, c), this rank's rows
    struct spread rows;
    size_t base[2]; // where both stacks began
    int side;
};

static struct tensor like(struct exec *x, const struct picture *p, int64_t channels)
{
    return exec_tensor(x, 3, p->t.n[0], p->t.n[1], channels, 1);
}

// Starts the successor: a tensor on the other stack, which is in use from here on; one that can be convolved in place.
static struct tensor begin_next(struct exec *x, int64_t h, int64_t w, int64_t c)
{
    arena_flip(x->arena);
    return exec_conv_input(x, h, w, c);
}

// next replaces the picture, whose stack is emptied.
static void finish_next(struct exec *x, struct picture *p, struct tensor next)
{
    arena_flip(x->arena);
    arena_release(x->arena, p->base[p->side]);
    arena_flip(x->arena);
    p->side = !p->side;
    p->t = next;
}

// y = conv(silu(norm(in))); a, which may be in, is a convolution's input of the shape of in.
static void normed_conv(const struct vae *v, struct exec *x, const struct picture *p, struct tensor y, struct tensor in,
                        struct tensor a, const struct norm *n, const struct conv *conv)
{
    exec_group_norm(x, a, in, n->gamma, n->beta, v->groups, EPS, ACT_SILU, &p->rows);
    exec_conv(x, y, a, conv, &p->rows);
}

// The picture stays and gets the branch added.
static void resnet_same(const struct vae *v, struct exec *x, const struct resnet *r, struct picture *p)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor b = like(x, p, r->out), a = exec_conv_input(x, b.n[0], b.n[1], b.n[2]);
    normed_conv(v, x, p, b, p->t, a, &r->norm1, &r->conv1);
    normed_conv(v, x, p, b, b, a, &r->norm2, &r->conv2);
    x->k->add(x->d, p->t, b);
    arena_release(x->arena, mark);
}

// Other channels: the shortcut is the successor's beginning, after which the picture's own memory serves the branch.
static void resnet_next(const struct vae *v, struct exec *x, const struct resnet *r, struct picture *p)
{
    struct tensor next = begin_next(x, p->t.n[0], p->t.n[1], r->out), a;
    const size_t mark = arena_mark(x->arena);
    struct tensor b = like(x, p, r->out);
    exec_conv(x, next, p->t, &r->shortcut, &p->rows);
    normed_conv(v, x, p, b, p->t, p->t, &r->norm1, &r->conv1);
    if (r->out <= r->in) // fits where the wider one was
        a = tensor_of(p->t.data, p->t.dtype, 3, b.n[0], b.n[1], b.n[2], 1);
    else
        a = exec_conv_input(x, b.n[0], b.n[1], b.n[2]);
    normed_conv(v, x, p, b, b, a, &r->norm2, &r->conv2);
    x->k->add(x->d, next, b);
    arena_release(x->arena, mark);
    finish_next(x, p, next);
}

static void resnet(const struct vae *v, struct exec *x, const struct resnet *r, struct picture *p)
{
    (r->in == r->out ? resnet_same : resnet_next)(v, x, r, p);
}

static void mid_attention(const struct vae *v, struct exec *x, struct picture *p)
{
    const struct attention *a = &v->attention;
    const int64_t c = p->t.n[2], w = p->t.n[1], pixels = p->t.n[0] * w;
    const size_t mark = arena_mark(x->arena);
    int64_t of_rank[COMM_MAX_RANKS];
    for (int r = 0; r < p->rows.ranks; r++)
        of_rank[r] = spread_of(&p->rows, r).count * w;
    struct tensor normed = like(x, p, c), flat = tensor_reshape(normed, 2, pixels, c, 1, 1);
    struct tensor qkv = exec_tensor(x, 2, pixels, 3 * c, 1, 1), head[3];
    exec_group_norm(x, normed, p->t, a->norm.gamma, a->norm.beta, v->groups, EPS, ACT_NONE, &p->rows);
    x->k->linear(x->d, qkv, flat, &a->qkv, ACT_NONE);
    for (int i = 0; i < 3; i++)
        head[i] = tensor_reshape(tensor_cols(qkv, i * c, c), 3, pixels, 1, c, 1);
    attention_gathered.attend(&attention_gathered, x,
                              &(struct attention_call){.out = tensor_reshape(flat, 3, pixels, 1, c, 1),
                                                       .q = head[0],
                                                       .k = head[1],
                                                       .v = head[2],
                                                       .rows = of_rank,
                                                       .opts.scale = 1.0F / sqrtf((float)c)});
    struct tensor y = tensor_cols(qkv, 0, c); // q is done with
    x->k->linear(x->d, y, flat, &a->out, ACT_NONE);
    x->k->add(x->d, tensor_reshape(p->t, 2, pixels, c, 1, 1), y);
    arena_release(x->arena, mark);
}

static void upsample(struct exec *x, const struct conv *conv, struct picture *p)
{
    const int64_t h = p->t.n[0], w = p->t.n[1], c = p->t.n[2];
    struct tensor next = begin_next(x, 2 * h, 2 * w, c);
    const size_t mark = arena_mark(x->arena);
    struct tensor large = exec_conv_input(x, 2 * h, 2 * w, c);
    p->rows = spread_scale(p->rows, 2);
    x->k->upsample2x(x->d, large, p->t);
    exec_conv(x, next, large, conv, &p->rows);
    arena_release(x->arena, mark);
    finish_next(x, p, next);
}

void vae_decode(const struct vae *v, struct exec *x, struct tensor latent, const struct spread *rows,
                struct tensor pixels)
{
    struct picture p = {.rows = *rows};
    p.base[0] = arena_mark(x->arena);
    arena_flip(x->arena);
    p.base[1] = arena_mark(x->arena);
    arena_flip(x->arena);

    struct tensor in = exec_conv_input(x, latent.n[0], latent.n[1], v->latent_channels);
    if (v->post_quant)
        exec_conv(x, in, latent, &v->post_quant_conv, rows);
    else
        x->k->copy(x->d, in, latent);
    p.t = in;
    struct tensor first = begin_next(x, latent.n[0], latent.n[1], v->channels[v->levels - 1]);
    exec_conv(x, first, in, &v->conv_in, rows);
    finish_next(x, &p, first);

    resnet(v, x, &v->mid[0], &p);
    if (v->mid_attention)
        mid_attention(v, x, &p);
    resnet(v, x, &v->mid[1], &p);
    for (int i = 0; i < v->levels; i++) {
        for (int64_t j = 0; j <= v->layers; j++)
            resnet(v, x, &v->level[i].resnet[j], &p);
        if (v->level[i].upsamples)
            upsample(x, &v->level[i].upsample, &p);
    }
    normed_conv(v, x, &p, pixels, p.t, p.t, &v->norm_out, &v->conv_out);

    arena_release(x->arena, p.base[p.side]);
    if (p.side == 1)
        arena_flip(x->arena);
}

void vae_normalisation(const struct vae *v, float *scaling_factor, float *shift_factor)
{
    *scaling_factor = (float)v->scaling_factor;
    *shift_factor = (float)v->shift_factor;
}

// ---- loading

static int load_config(struct vae *v, const char *dir, struct err *err)
{
    struct config *f = config_open(dir, "config.json", err);
    int64_t sample = 0;
    v->post_quant = v->mid_attention = true;
    v->scaling_factor = 0.18215;
    config_require(f, "_class_name", "AutoencoderKL");
    config_require(f, "act_fn", "silu");
    config_refuse(f, "latents_mean");
    config_refuse(f, "latents_std");
    config_int(f, "latent_channels", 1, 256, &v->latent_channels);
    config_int(f, "out_channels", 3, 3, &v->out_channels);
    config_int(f, "layers_per_block", 1, MAX_RESNETS - 1, &v->layers);
    config_int(f, "norm_num_groups", 1, 256, &v->groups);
    config_int_or(f, "sample_size", 1, 65536, &sample);
    config_ints(f, "block_out_channels", MAX_LEVELS, 1, 8192, v->channels, &v->levels);
    config_float_or(f, "scaling_factor", 1e-6, 1e6, &v->scaling_factor);
    config_float_or(f, "shift_factor", -1e6, 1e6, &v->shift_factor);
    config_bool_or(f, "use_post_quant_conv", &v->post_quant);
    config_bool_or(f, "mid_block_add_attention", &v->mid_attention);
    for (int i = 0; i < v->levels; i++)
        if (v->groups > 0 && v->channels[i] % v->groups)
            config_fail(f, ERR_INVALID, "each of block_out_channels must be a multiple of norm_num_groups");
    return config_close(f, err);
}

static int load_resnet(struct vae *v, struct resnet *r, int64_t in, int64_t out, struct err *err, const char *at)
{
    *r = (struct resnet){.in = in, .out = out};
    TRY(weights_norm(v->weights, &r->norm1.gamma, &r->norm1.beta, in, err, "decoder.%s.norm1", at));
    TRY(weights_norm(v->weights, &r->norm2.gamma, &r->norm2.beta, out, err, "decoder.%s.norm2", at));
    TRY(weights_conv(v->weights, &r->conv1, out, in, 3, err, "decoder.%s.conv1", at));
    TRY(weights_conv(v->weights, &r->conv2, out, out, 3, err, "decoder.%s.conv2", at));
    return in == out ? 0 : weights_conv(v->weights, &r->shortcut, out, in, 1, err, "decoder.%s.conv_shortcut", at);
}

static int load_attention(struct vae *v, int64_t c, struct err *err)
{
    static const char *const qkv[] = {"to_q", "to_k", "to_v"};
    static const char at[] = "decoder.mid_block.attentions.0";
    const int64_t n[] = {c, c, c};
    struct attention *a = &v->attention;
    TRY(weights_norm(v->weights, &a->norm.gamma, &a->norm.beta, c, err, "%s.group_norm", at));
    TRY(weights_linear(v->weights, &a->qkv, at, 3, qkv, n, c, true, err));
    return weights_linear1(v->weights, &a->out, c, c, true, err, "%s.to_out.0", at);
}

static int load_level(struct vae *v, int i, int64_t in, struct err *err)
{
    char at[64];
    struct level *l = &v->level[i];
    const int64_t out = v->channels[v->levels - 1 - i];
    for (int64_t j = 0; j <= v->layers; j++) {
        snprintf(at, sizeof at, "up_blocks.%d.resnets.%d", i, (int)j);
        TRY(load_resnet(v, &l->resnet[j], j == 0 ? in : out, out, err, at));
    }
    l->upsamples = i + 1 < v->levels;
    if (!l->upsamples)
        return 0;
    return weights_conv(v->weights, &l->upsample, out, out, 3, err, "decoder.up_blocks.%d.upsamplers.0.conv", i);
}

static int load_weights(struct vae *v, const char *dir, const struct home *home, struct err *err)
{
    const int64_t top = v->channels[v->levels - 1], z = v->latent_channels;
    TRY(weights_open(dir, "diffusion_pytorch_model", home, &v->weights, err));
    if (v->post_quant)
        TRY(weights_conv(v->weights, &v->post_quant_conv, z, z, 1, err, "post_quant_conv"));
    TRY(weights_conv(v->weights, &v->conv_in, top, z, 3, err, "decoder.conv_in"));
    TRY(load_resnet(v, &v->mid[0], top, top, err, "mid_block.resnets.0"));
    TRY(load_resnet(v, &v->mid[1], top, top, err, "mid_block.resnets.1"));
    if (v->mid_attention)
        TRY(load_attention(v, top, err));
    else
        TRY(weights_refuse(v->weights, "mid_block_add_attention", err,
                           "decoder.mid_block.attentions.0.group_norm.weight"));
    for (int i = 0; i < v->levels; i++)
        TRY(load_level(v, i, i ? v->channels[v->levels - i] : top, err));
    TRY(weights_refuse(v->weights, "block_out_channels", err, "decoder.up_blocks.%d.resnets.0.norm1.weight",
                       v->levels));
    TRY(weights_refuse(v->weights, "layers_per_block", err, "decoder.up_blocks.0.resnets.%d.norm1.weight",
                       (int)v->layers + 1));
    if (!v->post_quant)
        TRY(weights_refuse(v->weights, "use_post_quant_conv", err, "post_quant_conv.weight"));
    TRY(weights_norm(v->weights, &v->norm_out.gamma, &v->norm_out.beta, v->channels[0], err, "decoder.conv_norm_out"));
    return weights_conv(v->weights, &v->conv_out, v->out_channels, v->channels[0], 3, err, "decoder.conv_out");
}

int vae_load(const char *dir, const struct home *home, struct vae **out, struct err *err)
{
    *out = NULL;
    struct vae *v = calloc(1, sizeof *v);
    if (!v)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    int rc = load_config(v, dir, err);
    if (rc == 0)
        rc = load_weights(v, dir, home, err);
    if (rc != 0) {
        vae_free(v);
        return rc;
    }
    *out = v;
    return 0;
}

void vae_free(struct vae *v)
{
    if (!v)
        return;
    weights_free(v->weights);
    free(v);
}

int64_t vae_latent_channels(const struct vae *v)
{
    return v->latent_channels;
}

int64_t vae_scale(const struct vae *v)
{
    return (int64_t)1 << (v->levels - 1);
}

const struct weights *vae_weights(const struct vae *v)
{
    return v->weights;
}
