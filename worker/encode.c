// encode.c: prompts to embeddings. There are up to four encodings (two encoders, two branches of guidance); each is
// done by one rank and broadcast, so they run side by side, and every rank holds the same bits. A branch whose token
// ids were encoded lately is taken from the cache.
#include <openssl/evp.h>
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
    if (r->leads)
        r->hooks->trace(r->hooks->arg, name, tensor_2d(wide, DT_I64, 1, n));
    free(wide);
}

// Whatever the embeddings depend on.
static struct prompt_key key_of(const struct run *r, const struct ids *ids)
{
    const int64_t lengths[] = {clip_positions(r->model->clip), r->text_tokens};
    struct prompt_key key;
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    EVP_DigestUpdate(md, r->model->hash, sizeof r->model->hash);
    EVP_DigestUpdate(md, lengths, sizeof lengths);
    EVP_DigestUpdate(md, ids->clip, (size_t)lengths[0] * sizeof *ids->clip);
    EVP_DigestUpdate(md, ids->t5, (size_t)lengths[1] * sizeof *ids->t5);
    EVP_DigestFinal_ex(md, key.sha256, NULL);
    EVP_MD_CTX_free(md);
    return key;
}

// Finds or makes room for every branch's prompt; missing: which of them are to be encoded. False: none.
static bool look_up(struct run *r, const struct ids ids[BRANCHES], struct prompt prompts[BRANCHES],
                    bool missing[BRANCHES])
{
    const struct prompt_shape shape = {r->text_tokens, r->model->info.text_dim, r->model->info.pooled_dim};
    struct prompt_key keys[BRANCHES];
    bool any = false;
    for (int b = 0; b < r->branches; b++) {
        if (!r->cache) {
            prompts[b].embeds = exec_tensor(&r->world, 2, shape.tokens, shape.text_dim, 1, 1);
            prompts[b].pooled = exec_tensor(&r->world, 2, 1, shape.pooled_dim, 1, 1);
        } else {
            keys[b] = key_of(r, &ids[b]);
        }
        missing[b] = !r->cache || !prompt_cache_find(r->cache, &keys[b], &shape, &prompts[b]);
        any |= missing[b];
    }
    for (int b = 0; r->cache && b < r->branches; b++) // after all are found: a claim takes the place of an entry
        if (missing[b])
            prompt_cache_claim(r->cache, &keys[b], &shape, &prompts[b]);
    r->prompt_cached = !any;
    return any;
}

// An encoding: T5, the long one, of each branch first. Dealt out in this order, no rank gets two before all have one;
// whichever are missing, so that a rank's memory is that of the dry run, and its encoder the same from job to job.
struct task {
    int branch;
    bool t5;
    int rank;
};

static struct task task_of(const struct run *r, int i)
{
    return (struct task){i % r->branches, i < r->branches, i % comm_size(r->world.comm)};
}

static int encode_and_share(struct run *r, const struct ids ids[BRANCHES], struct prompt prompts[BRANCHES],
                            const bool missing[BRANCHES], struct err *err)
{
    struct exec alone = r->world; // an encoding is one rank's work
    alone.comm = NULL;
    alone.attention = &attention_local;
    const int me = comm_rank(r->world.comm), tasks = 2 * r->branches;
    unsigned parts = 0;
    for (int i = 0; i < tasks; i++) {
        const struct task t = task_of(r, i);
        if (t.rank == me && missing[t.branch])
            parts |= 1U << (t.t5 ? PART_T5 : PART_CLIP);
    }
    TRY(run_need(r, parts, err));
    run_begin(r);
    for (int i = 0; i < tasks; i++) {
        const struct task t = task_of(r, i);
        if (t.rank != me || !missing[t.branch])
            continue;
        if (t.t5)
            t5_encode(r->model->t5, &alone, ids[t.branch].t5, prompts[t.branch].embeds);
        else
            clip_encode(r->model->clip, &alone, ids[t.branch].clip, prompts[t.branch].pooled);
    }
    for (int i = 0; i < tasks; i++) {
        const struct task t = task_of(r, i);
        const struct tensor out = t.t5 ? prompts[t.branch].embeds : prompts[t.branch].pooled;
        if (missing[t.branch])
            comm_broadcast(r->world.comm, out.data, (int64_t)tensor_bytes(out), t.rank);
    }
    if (r->cache)
        prompt_cache_keep(r->cache);
    return 0;
}

static void trace_prompt(struct run *r, int branch, const struct ids *ids, const struct prompt *p)
{
    static const char *const names[BRANCHES][4] = {
        {"clip_ids", "t5_ids", "prompt_embeds", "pooled_prompt_embeds"},
        {"negative_clip_ids", "negative_t5_ids", "negative_prompt_embeds", "negative_pooled_prompt_embeds"}};
    trace_ids(r, names[branch][0], ids->clip, clip_positions(r->model->clip));
    trace_ids(r, names[branch][1], ids->t5, r->text_tokens);
    run_trace(r, names[branch][2], tensor_reshape(p->embeds, 3, 1, r->text_tokens, r->model->info.text_dim, 1));
    run_trace(r, names[branch][3], p->pooled);
}

int encode_prompts(struct run *r, struct prompt prompts[BRANCHES], bool cut[4], struct err *err)
{
    struct ids ids[BRANCHES] = {{0}};
    bool missing[BRANCHES] = {false};
    const int branches = r->branches;
    int rc = run_checkpoint(r, ENGINE_TEXT, 0, err);
    for (int b = 0; rc == 0 && b < branches; b++)
        rc = tokenize(r, b, &ids[b], cut, err);
    if (rc == 0 && look_up(r, ids, prompts, missing))
        rc = encode_and_share(r, ids, prompts, missing, err);
    for (int b = 0; b < branches; b++) {
        if (rc == 0)
            trace_prompt(r, b, &ids[b], &prompts[b]);
        free(ids[b].clip);
        free(ids[b].t5);
    }
    return rc;
}
