// encode.c: prompts to embeddings. There are up to four encodings (two encoders, two branches of guidance); each is
// done by one rank and broadcast, so they run side by side, and every rank holds the same bits.
#include <stdlib.h>
#include <string.h>

#include "worker/invent.h"
#include "worker/stages.h"

// The token ids of one branch, on the host.
struct ids {
    int32_t *clip, *t5;
};

static const char *or_else(const char *text, const char *otherwise)
{
    return text && *text ? text : otherwise;
}

static int tokenize(struct run *r, int branch, struct ids *ids, bool cut[4], struct err *err)
{
    const Ditfleet__V1__Job *job = r->job;
    const int clip_length = (int)clip_positions(r->model->clip);
    const char *first = branch ? job->negative_prompt : job->prompt;
    const char *second = or_else(branch ? job->negative_prompt_2 : job->prompt_2, first);
    int64_t count = 0;
    ids->clip = calloc((size_t)clip_length, sizeof *ids->clip);
    ids->t5 = calloc((size_t)r->text_tokens, sizeof *ids->t5);
    if (!ids->clip || !ids->t5)
        return err_set(err, ERR_NO_MEMORY, "no memory for token ids");
    if (r->dry)
        return 0;
    if (!r->model->t5_tokenizer) {
        invent_ids(first, clip_vocabulary(r->model->clip), ids->clip, clip_length);
        invent_ids(second, t5_vocabulary(r->model->t5), ids->t5, r->text_tokens);
        return 0;
    }
    TRY(clip_tokenizer_encode(r->model->clip_tokenizer, first, strlen(first), clip_length, ids->clip, &count, err));
    cut[2 * branch] = count > clip_length;
    TRY(t5_tokenizer_encode(r->model->t5_tokenizer, second, strlen(second), (int)r->text_tokens, ids->t5, &count, err));
    cut[2 * branch + (second != first)] |= count > r->text_tokens; // the text that the job holds
    return 0;
}

static void trace_ids(struct run *r, const char *name, const int32_t *ids, int64_t n)
{
    int64_t *wide = r->hooks->trace ? malloc((size_t)n * sizeof *wide) : NULL;
    if (!wide)
        return;
    for (int64_t i = 0; i < n; i++)
        wide[i] = ids[i];
    if (comm_rank(r->world.comm) == 0)
        r->hooks->trace(r->hooks->arg, name, tensor_2d(wide, DT_I64, 1, n));
    free(wide);
}

static void encode_and_share(struct run *r, const struct ids ids[BRANCHES], struct prompt prompts[BRANCHES])
{
    struct exec alone = r->world; // an encoding is one rank's work
    alone.comm = NULL;
    alone.attention = &attention_local;
    const int me = comm_rank(r->world.comm), ranks = comm_size(r->world.comm);
    // T5, the long one, of each branch first: dealt out in this order, no rank gets two before all have one.
    for (int task = 0; task < 2 * r->branches; task++) {
        const int branch = task % r->branches;
        if (task % ranks != me)
            continue;
        if (task < r->branches)
            t5_encode(r->model->t5, &alone, ids[branch].t5, prompts[branch].embeds);
        else
            clip_encode(r->model->clip, &alone, ids[branch].clip, prompts[branch].pooled);
    }
    for (int task = 0; task < 2 * r->branches; task++) {
        const struct prompt *p = &prompts[task % r->branches];
        struct tensor t = task < r->branches ? p->embeds : p->pooled;
        comm_broadcast(r->world.comm, t.data, (int64_t)tensor_bytes(t), task % ranks);
    }
}

int encode_prompts(struct run *r, struct prompt prompts[BRANCHES], bool cut[4], struct err *err)
{
    static const char *const names[BRANCHES][4] = {
        {"clip_ids", "t5_ids", "prompt_embeds", "pooled_prompt_embeds"},
        {"negative_clip_ids", "negative_t5_ids", "negative_prompt_embeds", "negative_pooled_prompt_embeds"}};
    struct ids ids[BRANCHES] = {{0}};
    const int branches = r->branches;
    int rc = run_checkpoint(r, ENGINE_TEXT, 0, err);
    for (int b = 0; b < branches; b++) {
        prompts[b].embeds = exec_tensor(&r->world, 2, r->text_tokens, r->model->info.text_dim, 1, 1);
        prompts[b].pooled = exec_tensor(&r->world, 2, 1, r->model->info.pooled_dim, 1, 1);
        if (rc == 0)
            rc = tokenize(r, b, &ids[b], cut, err);
    }
    if (rc == 0)
        encode_and_share(r, ids, prompts);
    for (int b = 0; b < branches; b++) {
        if (rc == 0) {
            trace_ids(r, names[b][0], ids[b].clip, clip_positions(r->model->clip));
            trace_ids(r, names[b][1], ids[b].t5, r->text_tokens);
            run_trace(r, names[b][2],
                      tensor_reshape(prompts[b].embeds, 3, 1, r->text_tokens, r->model->info.text_dim, 1));
            run_trace(r, names[b][3], prompts[b].pooled);
        }
        free(ids[b].clip);
        free(ids[b].t5);
    }
    return rc;
}
