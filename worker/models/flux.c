// FLUX.1's transformer (Black Forest Labs 2024; diffusers FluxTransformer2DModel is the reference implementation).
//
// Details that caused bugs elsewhere:
//  - Text rows come first in the joint sequence; in the single blocks both share one set of weights.
//  - AdaLN-zero chunks are (shift, scale, gate) for attention, then for the MLP; norm_out's are (scale, shift).
//  - The single block's output projection takes [attention | mlp], in this order.
//  - Frequencies of RoPE are float64, their cosines float32; text positions are zero on all axes.
//  - Time and guidance reach their sinusoid multiplied by 1000; cosines come first.
//  - The modulations depend on time and prompt only: computed for all steps before the loop.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/config.h"
#include "worker/ownership.h"
#include "worker/weights.h"

enum { MAX_BLOCKS = 256, SINUSOID = 256, MLP_RATIO = 4, AXES = 3 };
static const float EPS = 1e-6F;

// One stream (text or image) of a double block.
struct stream {
    struct linear mod; // 6 chunks: shift, scale, gate of attention; of the MLP
    struct linear qkv;
    struct tensor norm_q, norm_k; // (head_dim)
    struct linear out;
    struct linear up, down;
    int64_t mod_at; // first column in dit_cond.mod
};

struct double_block {
    struct stream text, image;
};

struct single_block {
    struct linear mod; // 3 chunks: shift, scale, gate
    struct linear qkv, up, out;
    struct tensor norm_q, norm_k;
    int64_t mod_at;
};

struct mlp_embedder {
    struct linear in, out;
};

struct flux {
    struct dit dit;
    int64_t n_double, n_single, heads, head_dim, dim, channels, text_dim, pooled_dim;
    int64_t axes[AXES];
    int n_axes;
    bool guidance;
    struct linear embed_image, embed_text, proj_out, mod_out;
    struct mlp_embedder time, pooled, scale; // scale: guidance
    struct double_block *doubles;
    struct single_block *singles;
    int64_t mod_out_at, mod_width;
};

static const struct flux *flux_of(const struct dit *m)
{
    return (const struct flux *)m;
}

static void info(const struct dit *m, struct dit_info *out)
{
    const struct flux *f = flux_of(m);
    const struct linear *qkv = f->n_double > 0 ? &f->doubles[0].image.qkv : &f->singles[0].qkv; // there is one more
    *out = (struct dit_info){.blocks = (int)(f->n_double + f->n_single),
                             .heads = f->heads,
                             .head_dim = f->head_dim,
                             .hidden = f->dim,
                             .channels = f->channels,
                             .position_axes = f->n_axes,
                             .text_dim = f->text_dim,
                             .pooled_dim = f->pooled_dim,
                             .guidance = f->guidance,
                             .eight_bits = dtype_quantised(qkv->w[0].dtype),
                             .twice = qkv->second != 0,
                             .attention_columns = (1 + MLP_RATIO) * f->dim};
}

// ---- before the loop

// Timesteps(256, flip_sin_to_cos, downscale_freq_shift 0) of diffusers: cosines first.
static void sinusoid(float t, float out[SINUSOID])
{
    const int half = SINUSOID / 2;
    for (int i = 0; i < half; i++) {
        float angle = t * expf(-logf(10000.0F) * (float)i / (float)half);
        out[i] = cosf(angle);
        out[half + i] = sinf(angle);
    }
}

static void embed_mlp(struct exec *x, const struct mlp_embedder *e, struct tensor y, struct tensor in)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor inner = exec_tensor(x, 2, in.n[0], e->in.n, 1, 1);
    x->k->linear(x->d, inner, in, &e->in, ACT_SILU);
    x->k->linear(x->d, y, inner, &e->out, ACT_NONE);
    arena_release(x->arena, mark);
}

// y (n, dim) = MLP(sinusoid(1000 * values[i])), n at most as many as steps
static void embed_scalars(struct exec *x, const struct mlp_embedder *e, struct tensor y, const float *values)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor waves = exec_tensor(x, 2, y.n[0], SINUSOID, 1, 1);
    for (int64_t i = 0; i < y.n[0]; i++) {
        float row[SINUSOID];
        sinusoid(values[i] * 1000.0F, row);
        x->k->upload(x->d, tensor_rows(waves, i, 1), row);
    }
    embed_mlp(x, e, y, waves);
    arena_release(x->arena, mark);
}

// The modulations in the order of their columns of dit_cond.mod: two streams of each double block, single blocks, head.
static int modulations(const struct flux *f)
{
    return (int)(2 * f->n_double + f->n_single + 1);
}

static const struct linear *modulation(const struct flux *f, int i, int64_t *at)
{
    const int64_t single = i - 2 * f->n_double;
    const struct stream *s = i % 2 ? &f->doubles[i / 2].image : &f->doubles[i / 2].text;
    if (single < 0) {
        *at = s->mod_at;
        return &s->mod;
    }
    *at = single < f->n_single ? f->singles[single].mod_at : f->mod_out_at;
    return single < f->n_single ? &f->singles[single].mod : &f->mod_out;
}

// mod (steps, mod_width) from c (steps, dim): each is computed by a rank that has it, and told to the others.
static void modulate_all(const struct flux *f, struct exec *x, struct tensor mod, struct tensor c)
{
    int64_t start[COMM_MAX_RANKS + 1], at;
    for (int i = 0; i < modulations(f); i++) {
        const struct linear *w = modulation(f, i, &at);
        if (ownership_computes(x->ownership, i))
            x->k->linear(x->d, tensor_cols(mod, at, w->n), c, w, ACT_NONE);
    }
    for (int r = 0; x->ownership && r <= x->ownership->ranks; r++) {
        start[r] = f->mod_width;
        if (x->ownership->once[r] < modulations(f))
            modulation(f, x->ownership->once[r], &start[r]);
    }
    ownership_share(x, mod, start);
}

static void prepare(const struct dit *m, struct exec *x, const float *sigmas, int steps, float guidance,
                    struct tensor prompt, struct tensor pooled, struct dit_cond *cond)
{
    const struct flux *f = flux_of(m);
    cond->text = exec_tensor(x, 2, prompt.n[0], f->dim, 1, 1);
    cond->mod = exec_tensor(x, 2, steps, f->mod_width, 1, 1);
    cond->now = exec_tensor(x, 2, 1, f->mod_width, 1, 1);
    x->k->linear(x->d, cond->text, prompt, &f->embed_text, ACT_NONE);

    const size_t mark = arena_mark(x->arena);
    struct tensor c = exec_tensor(x, 2, steps, f->dim, 1, 1); // the conditioning vector of each step
    struct tensor once = exec_tensor(x, 2, 1, f->dim, 1, 1);  // the parts that are the same for all
    struct tensor row = tensor_reshape(once, 1, f->dim, 1, 1, 1);
    embed_scalars(x, &f->time, c, sigmas);
    embed_mlp(x, &f->pooled, once, pooled);
    x->k->add_row(x->d, c, row);
    if (f->guidance) {
        embed_scalars(x, &f->scale, once, &guidance);
        x->k->add_row(x->d, c, row);
    }
    x->k->activate(x->d, c, ACT_SILU);
    modulate_all(f, x, cond->mod, c);
    arena_release(x->arena, mark);
}

// One axis of rope: n numbers for the position.
static void turns(float position, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i += 2) {
        double angle = (double)position / pow(10000.0, (double)i / (double)n);
        out[i] = (float)cos(angle);
        out[i + 1] = (float)sin(angle);
    }
}

// Few positions stand for many rows (a picture's columns and rows), so each is worked out once: first[p] is the row
// that was the first to have position p on this axis.
static void rope(const struct dit *m, const float *ids, int64_t rows, float *out)
{
    enum { POSITIONS = 4096 };
    const struct flux *f = flux_of(m);
    int64_t at = 0, first[POSITIONS];
    for (int a = 0; a < f->n_axes; at += f->axes[a++]) {
        memset(first, -1, sizeof first);
        for (int64_t r = 0; r < rows; r++) {
            const float position = ids[r * f->n_axes + a];
            const int slot = position >= 0 && position < POSITIONS && position == floorf(position) ? (int)position : -1;
            float *to = out + r * f->head_dim + at;
            if (slot >= 0 && first[slot] >= 0) {
                memcpy(to, out + first[slot] * f->head_dim + at, (size_t)f->axes[a] * sizeof *to);
                continue;
            }
            turns(position, f->axes[a], to);
            if (slot >= 0)
                first[slot] = r;
        }
    }
}

// ---- the forward pass

// Chunk i of the modulation that starts at column at, for the step in hand: (dim)
static struct tensor chunk(const struct flux *f, const struct dit_pass *p, int64_t at, int i)
{
    struct tensor row = tensor_cols(p->cond->now, at + i * f->dim, f->dim);
    return tensor_reshape(row, 1, f->dim, 1, 1, 1);
}

static struct tensor text_rows(const struct dit_pass *p, struct tensor t)
{
    return tensor_rows(t, 0, p->rows->text.count);
}

static struct tensor image_rows(const struct dit_pass *p, struct tensor t)
{
    return tensor_rows(t, p->rows->text.count, p->rows->image.count);
}

// Query, key or value (0, 1, 2) of the heads that qkv (rows, 3 * heads * head_dim) has
static struct tensor part_of(const struct flux *f, struct tensor qkv, int i)
{
    const int64_t width = qkv.n[1] / 3;
    return tensor_reshape(tensor_cols(qkv, i * width, width), 3, qkv.n[0], width / f->head_dim, f->head_dim, 1);
}

static void embed(const struct dit *m, struct exec *x, struct dit_pass *p, struct tensor tokens)
{
    x->k->copy(x->d, text_rows(p, p->hidden), tensor_rows(p->cond->text, p->rows->text.start, p->rows->text.count));
    x->k->linear(x->d, image_rows(p, p->hidden), tokens, &flux_of(m)->embed_image, ACT_NONE);
    p->update = exec_tensor(x, 2, p->hidden.n[0], p->hidden.n[1], 1, 1);
    p->pending = false;
}

// normed = norm of some rows of hidden, h, modulated by the chunks scale and shift of at, after the residual that h
// lacks (gate * update) was added.
static void enter(const struct flux *f, struct exec *x, const struct dit_pass *p, struct tensor h, struct tensor gate,
                  struct tensor update, struct tensor normed, int64_t at, int scale, int shift)
{
    if (p->pending)
        x->k->gate_add_modulate(x->d, h, gate, update, normed, chunk(f, p, at, scale), chunk(f, p, at, shift), EPS);
    else
        x->k->modulate(x->d, normed, h, chunk(f, p, at, scale), chunk(f, p, at, shift), EPS);
}

// What a block leaves to be added: update is filled.
static void leave(struct dit_pass *p, struct tensor text_gate, struct tensor image_gate)
{
    p->pending = true;
    p->text_gate = text_gate;
    p->image_gate = image_gate;
}

// out (rows, dim) = attention of all rows with each other; qkv (rows that are projected, 3 * their heads * head_dim)
// already normed and rotated. A block whose products, as that of w, are of integers attends in 8 bits.
static void attend(const struct flux *f, struct exec *x, const struct dit_pass *p, int layer, const struct linear *w,
                   struct tensor out, struct tensor qkv)
{
    exec_attend(x, &(struct attention_call){.layer = layer,
                                            .out = tensor_reshape(out, 3, out.n[0], f->heads, f->head_dim, 1),
                                            .q = part_of(f, qkv, 0),
                                            .k = part_of(f, qkv, 1),
                                            .v = part_of(f, qkv, 2),
                                            .rows = p->rows->of_rank,
                                            .opts.scale = 1.0F / sqrtf((float)f->head_dim),
                                            .opts.eight_bits = w->w[0].dtype == DT_I8});
}

// qkv (rows that are projected, ...) of some rows of the attention's input, from first on, normed and rotated.
static void project(const struct flux *f, struct exec *x, const struct dit_pass *p, const struct attention_input *in,
                    struct tensor qkv, int64_t first, int64_t rows, const struct linear *w, struct tensor norm_q,
                    struct tensor norm_k)
{
    if (rows == 0)
        return; // none of this stream, or none but one's own
    const struct linear mine = linear_slice(w, 3, in->first_head * f->head_dim, in->heads * f->head_dim);
    const struct tensor to = tensor_rows(qkv, first, rows);
    x->k->linear(x->d, to, tensor_rows(in->rows, first, rows), &mine, ACT_NONE);
    x->k->qk_norm_rope(x->d, part_of(f, to, 0), part_of(f, to, 1), norm_q, norm_k, EPS,
                       tensor_rows(p->rows->rope, first, rows));
}

// The same, of two streams.
static void project_both(const struct flux *f, struct exec *x, const struct dit_pass *p,
                         const struct attention_input *in, struct tensor qkv, int64_t first, int64_t rows,
                         const struct double_block *b)
{
    const int64_t left = p->rows->projected_text - first, text = left < 0 ? 0 : left < rows ? left : rows;
    project(f, x, p, in, qkv, first, text, &b->text.qkv, b->text.norm_q, b->text.norm_k);
    project(f, x, p, in, qkv, first + text, rows - text, &b->image.qkv, b->image.norm_q, b->image.norm_k);
}

static struct tensor projected(const struct flux *f, struct exec *x, const struct attention_input *in)
{
    return exec_tensor(x, 2, in->rows.n[0], 3 * in->heads * f->head_dim, 1, 1);
}

// One stream's rows of what a double block works on.
struct stream_rows {
    struct tensor h, update, gate, normed, attention;
};

static struct stream_rows stream_rows(const struct dit_pass *p, bool text, struct tensor normed,
                                      struct tensor attention)
{
    struct tensor (*of)(const struct dit_pass *, struct tensor) = text ? text_rows : image_rows;
    return (struct stream_rows){.h = of(p, p->hidden),
                                .update = of(p, p->update),
                                .gate = text ? p->text_gate : p->image_gate,
                                .normed = of(p, normed),
                                .attention = of(p, attention)};
}

static void stream_out(const struct flux *f, struct exec *x, const struct dit_pass *p, const struct stream *s,
                       const struct stream_rows *r)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor normed = exec_input(x, r->h.n[0], &s->up);
    struct tensor inner = exec_tensor(x, 2, r->h.n[0], MLP_RATIO * f->dim, 1, 1);
    x->k->linear(x->d, r->update, r->attention, &s->out, ACT_NONE);
    x->k->gate_add_modulate(x->d, r->h, chunk(f, p, s->mod_at, 2), r->update, normed, chunk(f, p, s->mod_at, 4),
                            chunk(f, p, s->mod_at, 3), EPS);
    x->k->linear(x->d, inner, normed, &s->up, ACT_GELU_TANH);
    x->k->linear(x->d, r->update, inner, &s->down, ACT_NONE);
    arena_release(x->arena, mark);
}

static void double_block(const struct flux *f, struct exec *x, struct dit_pass *p, int i)
{
    const struct double_block *b = &f->doubles[i];
    const size_t mark = arena_mark(x->arena);
    struct tensor attention = exec_attention_output(x, p->hidden.n[0], f->dim);
    const size_t inner = arena_mark(x->arena);
    const struct attention_input in =
        exec_attention_input(x, &b->image.qkv, f->heads, p->hidden.n[0], p->rows->of_rank);
    const struct stream_rows text = stream_rows(p, true, in.mine, attention),
                             image = stream_rows(p, false, in.mine, attention);
    const int64_t rows = in.mine.n[0], after = in.first_row + rows;
    struct tensor qkv = projected(f, x, &in);
    enter(f, x, p, text.h, text.gate, text.update, text.normed, b->text.mod_at, 1, 0);
    enter(f, x, p, image.h, image.gate, image.update, image.normed, b->image.mod_at, 1, 0);
    exec_share_input(x, &in); // while other ranks' rows come:
    project_both(f, x, p, &in, qkv, in.first_row, rows, b);
    exec_input_shared(x);
    project_both(f, x, p, &in, qkv, 0, in.first_row, b);
    project_both(f, x, p, &in, qkv, after, qkv.n[0] - after, b);
    attend(f, x, p, i, &b->image.qkv, attention, qkv);
    arena_release(x->arena, inner);
    stream_out(f, x, p, &b->text, &text);
    stream_out(f, x, p, &b->image, &image);
    leave(p, chunk(f, p, b->text.mod_at, 5), chunk(f, p, b->image.mod_at, 5));
    arena_release(x->arena, mark);
}

// The first of the single blocks finds text and image with a gate each, the others one gate for all rows.
static void single_enter(const struct flux *f, struct exec *x, const struct dit_pass *p, struct tensor normed,
                         int64_t at)
{
    if (!p->pending || p->text_gate.data == p->image_gate.data) {
        enter(f, x, p, p->hidden, p->image_gate, p->update, normed, at, 1, 0);
        return;
    }
    enter(f, x, p, text_rows(p, p->hidden), p->text_gate, text_rows(p, p->update), text_rows(p, normed), at, 1, 0);
    enter(f, x, p, image_rows(p, p->hidden), p->image_gate, image_rows(p, p->update), image_rows(p, normed), at, 1, 0);
}

static void single_block(const struct flux *f, struct exec *x, struct dit_pass *p, int i)
{
    const struct single_block *b = &f->singles[i];
    const int64_t rows = p->hidden.n[0];
    const size_t mark = arena_mark(x->arena);
    struct tensor both = exec_attention_output(x, rows, (1 + MLP_RATIO) * f->dim); // [attention | mlp]
    const struct attention_input in = exec_attention_input(x, &b->qkv, f->heads, rows, p->rows->of_rank);
    struct tensor qkv = projected(f, x, &in);
    single_enter(f, x, p, in.mine, b->mod_at);
    exec_share_input(x, &in); // while other ranks' rows come:
    x->k->linear(x->d, tensor_cols(both, f->dim, MLP_RATIO * f->dim), in.mine, &b->up, ACT_GELU_TANH);
    exec_input_shared(x);
    project(f, x, p, &in, qkv, 0, qkv.n[0], &b->qkv, b->norm_q, b->norm_k);
    attend(f, x, p, (int)f->n_double + i, &b->qkv, tensor_cols(both, 0, f->dim), qkv);
    x->k->linear(x->d, p->update, both, &b->out, ACT_NONE);
    leave(p, chunk(f, p, b->mod_at, 2), chunk(f, p, b->mod_at, 2));
    arena_release(x->arena, mark);
}

static void block(const struct dit *m, struct exec *x, struct dit_pass *p, int i)
{
    const struct flux *f = flux_of(m);
    if (i < f->n_double)
        double_block(f, x, p, i);
    else
        single_block(f, x, p, i - (int)f->n_double);
}

static void head(const struct dit *m, struct exec *x, struct dit_pass *p, struct tensor out)
{
    const struct flux *f = flux_of(m);
    const size_t mark = arena_mark(x->arena);
    struct tensor normed = exec_tensor(x, 2, p->rows->image.count, f->dim, 1, 1);
    enter(f, x, p, image_rows(p, p->hidden), p->image_gate, image_rows(p, p->update), normed, f->mod_out_at, 0, 1);
    x->k->linear(x->d, out, normed, &f->proj_out, ACT_NONE);
    arena_release(x->arena, mark);
}

// ---- loading

static int load_config(struct flux *f, const char *dir, struct err *err)
{
    struct config *c = config_open(dir, "config.json", err);
    int64_t patch = 1, sum = 0;
    config_require(c, "_class_name", "FluxTransformer2DModel");
    config_int(c, "num_layers", 0, MAX_BLOCKS, &f->n_double);
    config_int(c, "num_single_layers", 0, MAX_BLOCKS, &f->n_single);
    config_int(c, "num_attention_heads", 1, 256, &f->heads);
    config_int(c, "attention_head_dim", 2, 512, &f->head_dim);
    config_int(c, "in_channels", 4, 4096, &f->channels);
    config_int_or(c, "out_channels", f->channels, f->channels, &f->channels);
    config_int(c, "joint_attention_dim", 1, 65536, &f->text_dim);
    config_int(c, "pooled_projection_dim", 1, 65536, &f->pooled_dim);
    config_int_or(c, "patch_size", 1, 1, &patch);
    config_bool_or(c, "guidance_embeds", &f->guidance);
    config_ints(c, "axes_dims_rope", AXES, 2, 512, f->axes, &f->n_axes);
    for (int a = 0; a < f->n_axes; a++)
        sum += f->axes[a] % 2 ? -1 : f->axes[a];
    if (sum != f->head_dim || f->n_axes != AXES)
        config_fail(c, ERR_INVALID, "axes_dims_rope must be 3 even numbers that add up to attention_head_dim %lld",
                    (long long)f->head_dim);
    f->dim = f->heads * f->head_dim;
    return config_close(c, err);
}

static int load_stream(struct flux *f, struct stream *s, int i, bool text, struct err *err)
{
    static const char *const qkv[2][3] = {{"to_q", "to_k", "to_v"}, {"add_q_proj", "add_k_proj", "add_v_proj"}};
    struct weights *w = f->dit.weights;
    const int64_t dim = f->dim, n[3] = {dim, dim, dim};
    const char *norm = text ? "norm1_context" : "norm1", *ff = text ? "ff_context" : "ff";
    char attn[64];
    snprintf(attn, sizeof attn, "transformer_blocks.%d.attn", i);
    weights_belong(w, WEIGHTS_ONCE, 2 * i + !text);
    TRY(weights_linear1(w, &s->mod, 6 * dim, dim, true, err, "transformer_blocks.%d.%s.linear", i, norm));
    weights_belong(w, WEIGHTS_BLOCK, i);
    weights_offer_codes(w, true);
    TRY(weights_linear(w, &s->qkv, attn, 3, qkv[text], n, dim, true, err));
    TRY(weights_get(w, &s->norm_q, 1, f->head_dim, 1, 1, 1, err, "%s.norm_%sq.weight", attn, text ? "added_" : ""));
    TRY(weights_get(w, &s->norm_k, 1, f->head_dim, 1, 1, 1, err, "%s.norm_%sk.weight", attn, text ? "added_" : ""));
    TRY(weights_linear1(w, &s->out, dim, dim, true, err, "%s.%s", attn, text ? "to_add_out" : "to_out.0"));
    TRY(weights_linear1(w, &s->up, MLP_RATIO * dim, dim, true, err, "transformer_blocks.%d.%s.net.0.proj", i, ff));
    TRY(weights_linear1(w, &s->down, dim, MLP_RATIO * dim, true, err, "transformer_blocks.%d.%s.net.2", i, ff));
    weights_offer_codes(w, false);
    s->mod_at = f->mod_width;
    f->mod_width += 6 * dim;
    return 0;
}

static int load_single(struct flux *f, struct single_block *s, int i, struct err *err)
{
    static const char *const qkv[3] = {"to_q", "to_k", "to_v"};
    struct weights *w = f->dit.weights;
    const int64_t dim = f->dim, n[3] = {dim, dim, dim};
    char attn[64];
    snprintf(attn, sizeof attn, "single_transformer_blocks.%d.attn", i);
    weights_belong(w, WEIGHTS_ONCE, (int)(2 * f->n_double) + i);
    TRY(weights_linear1(w, &s->mod, 3 * dim, dim, true, err, "single_transformer_blocks.%d.norm.linear", i));
    weights_belong(w, WEIGHTS_BLOCK, (int)f->n_double + i);
    weights_offer_codes(w, true);
    TRY(weights_linear(w, &s->qkv, attn, 3, qkv, n, dim, true, err));
    TRY(weights_get(w, &s->norm_q, 1, f->head_dim, 1, 1, 1, err, "%s.norm_q.weight", attn));
    TRY(weights_get(w, &s->norm_k, 1, f->head_dim, 1, 1, 1, err, "%s.norm_k.weight", attn));
    TRY(weights_linear1(w, &s->up, MLP_RATIO * dim, dim, true, err, "single_transformer_blocks.%d.proj_mlp", i));
    TRY(weights_linear1(w, &s->out, dim, (1 + MLP_RATIO) * dim, true, err, "single_transformer_blocks.%d.proj_out", i));
    weights_offer_codes(w, false);
    s->mod_at = f->mod_width;
    f->mod_width += 3 * dim;
    return 0;
}

static int load_embedder(const struct flux *f, struct mlp_embedder *e, const char *name, int64_t in, struct err *err)
{
    TRY(weights_linear1(f->dit.weights, &e->in, f->dim, in, true, err, "time_text_embed.%s.linear_1", name));
    return weights_linear1(f->dit.weights, &e->out, f->dim, f->dim, true, err, "time_text_embed.%s.linear_2", name);
}

static int load_blocks(struct flux *f, const char *dir, struct err *err)
{
    f->doubles = calloc((size_t)f->n_double + 1, sizeof *f->doubles);
    f->singles = calloc((size_t)f->n_single + 1, sizeof *f->singles);
    if (!f->doubles || !f->singles)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    for (int i = 0; i < f->n_double; i++) {
        TRY(load_stream(f, &f->doubles[i].text, i, true, err));
        TRY(load_stream(f, &f->doubles[i].image, i, false, err));
    }
    for (int i = 0; i < f->n_single; i++)
        TRY(load_single(f, &f->singles[i], i, err));
    weights_belong(f->dit.weights, WEIGHTS_ONCE, modulations(f) - 1);
    TRY(weights_linear1(f->dit.weights, &f->mod_out, 2 * f->dim, f->dim, true, err, "norm_out.linear"));
    f->mod_out_at = f->mod_width;
    f->mod_width += 2 * f->dim;
    return 0;
}

static int load_weights(struct flux *f, const char *dir, const char *file, const struct home *home, struct err *err)
{
    if (file)
        TRY(weights_open_file(file, home, &f->dit.weights, err));
    else
        TRY(weights_open(dir, "diffusion_pytorch_model", home, &f->dit.weights, err));
    TRY(weights_divide(f->dit.weights, (int)(f->n_double + f->n_single), modulations(f), err));
    TRY(load_blocks(f, dir, err));
    weights_belong(f->dit.weights, WEIGHTS_COMMON, 0);
    TRY(weights_refuse(f->dit.weights, "num_layers", err, "transformer_blocks.%d.norm1.linear.weight",
                       (int)f->n_double));
    TRY(weights_refuse(f->dit.weights, "num_single_layers", err, "single_transformer_blocks.%d.norm.linear.weight",
                       (int)f->n_single));
    TRY(load_embedder(f, &f->time, "timestep_embedder", SINUSOID, err));
    TRY(load_embedder(f, &f->pooled, "text_embedder", f->pooled_dim, err));
    if (f->guidance)
        TRY(load_embedder(f, &f->scale, "guidance_embedder", SINUSOID, err));
    else
        TRY(weights_refuse(f->dit.weights, "guidance_embeds", err,
                           "time_text_embed.guidance_embedder.linear_1.weight"));
    TRY(weights_linear1(f->dit.weights, &f->embed_image, f->dim, f->channels, true, err, "x_embedder"));
    TRY(weights_linear1(f->dit.weights, &f->embed_text, f->dim, f->text_dim, true, err, "context_embedder"));
    TRY(weights_linear1(f->dit.weights, &f->proj_out, f->channels, f->dim, true, err, "proj_out"));
    TRY(weights_refuse_rest(f->dit.weights, err));
    return weights_settle(f->dit.weights, err);
}

static void flux_free(struct dit *m)
{
    struct flux *f = (struct flux *)m;
    if (!f)
        return;
    weights_free(f->dit.weights);
    free(f->doubles);
    free(f->singles);
    free(f);
}

static const struct dit_ops ops = {
    .info = info, .prepare = prepare, .rope = rope, .embed = embed, .block = block, .head = head, .free = flux_free};

int flux_load(const char *dir, const char *file, const struct home *home, struct dit **out, struct err *err)
{
    *out = NULL;
    struct flux *f = calloc(1, sizeof *f);
    if (!f)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    f->dit.ops = &ops;
    int rc = load_config(f, dir, err);
    if (rc == 0)
        rc = load_weights(f, dir, file, home, err);
    if (rc != 0) {
        flux_free(&f->dit);
        return rc;
    }
    *out = &f->dit;
    return 0;
}
