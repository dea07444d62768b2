#include "worker/loop.h"

#include <stdlib.h>

void loop_schedule(const struct run *r, struct schedule *s)
{
    const float *shift = r->job->shift__case ? &r->job->shift : NULL;
    s->steps = (int)r->job->num_inference_steps;
    sampler_schedule(&r->model->sampler, s->steps, r->image_tokens, shift, s->sigmas, s->timesteps);
}

bool loop_my_branch(const struct run *r, int b)
{
    return r->pair == NULL || b == comm_rank(r->pair);
}

static int make_rope(struct run *r, struct span text, struct span image, struct tensor *rope, struct err *err)
{
    const struct dit_info *info = &r->model->info;
    const int64_t count = text.count + image.count, grid_w = r->latent_w / 2;
    float *ids = calloc((size_t)(count * info->position_axes) + 1, sizeof *ids);
    float *turns = malloc((size_t)(count * info->head_dim + 1) * sizeof *turns);
    *rope = arena_tensor(r->branch.arena, DT_F32, 3, count, info->head_dim / 2, 2, 1);
    if (ids && turns) {
        for (int64_t i = 0; i < image.count; i++) {
            float *id = ids + (text.count + i) * info->position_axes;
            const int64_t row = (image.start + i) / grid_w;
            id[1] = (float)row;
            id[2] = (float)(image.start + i - row * grid_w);
        }
        if (!r->dry)
            r->model->dit->ops->rope(r->model->dit, ids, count, turns);
        r->branch.k->upload(r->branch.d, *rope, turns);
    }
    const bool short_of_memory = !ids || !turns;
    free(ids);
    free(turns);
    return short_of_memory ? err_set(err, ERR_NO_MEMORY, "no memory for position tables") : 0;
}

// Of rows from start to end of the joint sequence, those that are text.
static struct span text_within(int64_t start, int64_t end, int64_t text_rows)
{
    const int64_t from = start < text_rows ? start : text_rows, to = end < text_rows ? end : text_rows;
    return (struct span){from, to - from};
}

// The joint sequence, as evenly as can be by the time that rows take. A text row counts for more than one of the image:
// double blocks take text apart, and so few rows take longer each. In 8 bits that is little beside the parts of tiles
// that equal shares avoid.
static struct spread deal_by_time(const struct run *r, int64_t text_rows, int64_t image_rows)
{
    const int64_t image = 8, each = r->model->info.eight_bits ? image : 9, text = each * text_rows;
    struct spread s = spread_even(text + image * image_rows, comm_rank(r->branch.comm), comm_size(r->branch.comm));
    for (int i = 0; i <= s.ranks; i++)
        s.start[i] = s.start[i] < text ? s.start[i] / each : text_rows + (s.start[i] - text) / image;
    return s;
}

int loop_deal(struct run *r, int64_t text_rows, struct span image, struct share *out, struct err *err)
{
    const int me = comm_rank(r->branch.comm), ranks = comm_size(r->branch.comm);
    const struct spread all = deal_by_time(r, text_rows, image.count);
    const struct input_sharing *together = r->branch.sharing;
    const int first = together ? together->first : me, members = together ? comm_size(together->comm) : 1;
    out->spread = (struct spread){.rank = me, .ranks = ranks};
    for (int i = 0; i <= ranks; i++)
        out->spread.start[i] = all.start[i] > text_rows ? all.start[i] - text_rows : 0;
    for (int i = 0; i < ranks; i++)
        out->of_rank[i] = spread_of(&all, i).count;
    out->rows = (struct dit_rows){.text = text_within(all.start[me], all.start[me + 1], text_rows),
                                  .image = spread_mine(&out->spread),
                                  .of_rank = out->of_rank};
    out->rows.image.start += image.start;
    const struct span text = text_within(all.start[first], all.start[first + members], text_rows);
    const int64_t from = out->spread.start[first], to = out->spread.start[first + members];
    out->rows.projected_text = text.count;
    return make_rope(r, text, (struct span){image.start + from, to - from}, &out->rows.rope, err);
}

void loop_condition(struct run *r, const struct schedule *s, const struct prompt prompts[BRANCHES],
                    struct dit_cond cond[BRANCHES])
{
    float model_time[SAMPLER_MAX_STEPS]; // the model multiplies by 1000 again, as the reference does
    for (int i = 0; i < s->steps; i++)
        model_time[i] = s->timesteps[i] / 1000.0F;
    for (int b = 0; b < r->branches; b++) // what ranks compute for each other they compute for both branches
        if (loop_my_branch(r, b) || r->branch.ownership)
            r->model->dit->ops->prepare(r->model->dit, &r->branch, model_time, s->steps, r->job->guidance_scale,
                                        prompts[b].embeds, prompts[b].pooled, &cond[b]);
}

void loop_exchange(struct run *r, struct tensor v[BRANCHES])
{
    if (!r->pair)
        return;
    const int64_t bytes = (int64_t)tensor_bytes(v[0]), counts[BRANCHES] = {bytes, bytes};
    comm_all_gather(r->pair, v[comm_rank(r->pair)].data, v[0].data, counts);
}

void loop_trace_schedule(struct run *r, const struct schedule *s)
{
    if (!r->hooks->trace || !r->leads)
        return;
    float t0 = s->timesteps[0] / 1000.0F;
    r->hooks->trace(r->hooks->arg, "sigmas", tensor_1d((float *)s->sigmas, DT_F32, s->steps + 1));
    r->hooks->trace(r->hooks->arg, "timesteps", tensor_1d((float *)s->timesteps, DT_F32, s->steps));
    r->hooks->trace(r->hooks->arg, "transformer_timestep_0", tensor_1d(&t0, DT_F32, 1));
}
